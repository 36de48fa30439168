"""Published logs of real models, through the package's own metrics and aggregates.

Over 400 lines, so that the layout of each log and the scores made of it are read in one place.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from unlearn_llm.evaluation import scores, texts
from unlearn_llm.evaluation.aggregates import AGGREGATES, Score
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.requests import Generation, LogProb, LogProbResult, Result, Row, Sample
from unlearn_llm.evaluation.text_metrics import gated_labels

# float64 sums in another order; the oracles themselves agree with the official code to 2e-16.
TOLERANCE = 1e-9
# open-unlearning logs exp(-loss) computed in float32: each row is off by up to half a unit in
# the last place of 1, and so may their mean be. Its logged losses do not give more digits.
FLOAT32 = 2**-24
TOFU_PROBES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
TOFU_NAMES = {
    "retain": "Retain",
    "real_authors": "Real Authors",
    "world_facts": "Real World",
    "forget": "Forget",
}
OPEN_UNLEARNING_PROBES = {
    "retain": "retain",
    "real_authors": "ra",
    "world_facts": "wf",
    "forget": "forget",
}
LIKELIHOOD = (
    "probability",
    "probability_normalised",
    "probability_normalised_eps",
    "truth_ratio",
    "truth_ratio_arithmetic",
    "truth_ratio_eps",
    "mia_loss",
)


def test_tofu_logs_give_the_published_metrics(shared: Path) -> None:
    for model in load(shared, "tofu_locuslab_eval_logs")["models"].values():
        columns = tofu_columns(model["logs"])
        for variant, ratio in (
            ("aggregate_eval_stat_py", "truth_ratio"),
            ("utils_py", "truth_ratio_arithmetic"),
        ):
            found = tofu_scores(columns, ratio)
            assert found == close(model["expected"][variant])
            assert len(found) == 13


def test_tofu_forget_quality_pairs(shared: Path) -> None:
    logs = load(shared, "tofu_locuslab_eval_logs")
    for pair in logs["forget_quality_pairs"]:
        unlearned = tofu_columns(logs["models"][pair["unlearn"]]["logs"])
        retrained = tofu_columns(logs["models"][pair["retain"]]["logs"])
        quality = AGGREGATES["forget_quality"](unlearned, reference=retrained)
        assert quality.value == pytest.approx(pair["forget_quality"], rel=1e-6, abs=0)
        assert quality.n == pair["n"]
        distance = AGGREGATES["ks_statistic"](unlearned, reference=retrained)
        assert distance.value == pytest.approx(pair["ks_stat"], abs=TOLERANCE)
        arithmetic = AGGREGATES["forget_quality"](
            unlearned, metric="truth_ratio_arithmetic", reference=retrained
        )
        expected = pair["p_if_truth_ratio_arithmetic"]
        assert arithmetic.value == pytest.approx(expected, rel=1e-6, abs=0)


def test_open_unlearning_tofu_logs(shared: Path) -> None:
    models = load(shared, "open_unlearning_tofu_eval_logs")["models"]
    all_columns = {name: open_unlearning_columns(model["logs"]) for name, model in models.items()}
    for name, model in models.items():
        columns = all_columns[name]
        # zlib, min-k++ and gradnorm have no rows in this file: they need more than a log.
        rowless = {"mia_zlib", "mia_min_k_plus_plus", "mia_gradnorm", "mia_reference"}
        expected = {k: v for k, v in model["expected"].items() if k not in rowless}
        found = open_unlearning_scores(columns)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            tolerance = FLOAT32 if "_Prob" in key else TOLERANCE
            assert found[key] == pytest.approx(value, rel=0, abs=tolerance), key

        reference = all_columns.get(model.get("retain_model"))
        assert_privleak(columns, reference, model["expected_privleak"])
        assert_reference_attack(columns, reference, model["expected"])
        if model["expected_forget_quality"] is not None:
            quality = AGGREGATES["forget_quality"](
                columns, metric="truth_ratio_eps", reference=reference
            )
            expected_quality = model["expected_forget_quality"]
            assert quality.value == pytest.approx(expected_quality, rel=1e-6, abs=0)
            distance = AGGREGATES["ks_statistic"](
                columns, metric="truth_ratio_eps", reference=reference
            )
            assert distance.value == pytest.approx(model["ks_stat"], abs=TOLERANCE)


def test_open_unlearning_muse_logs(shared: Path) -> None:
    models = load(shared, "open_unlearning_muse_eval_logs")["models"]
    all_columns = {name: muse_columns(model["logs"]) for name, model in models.items()}
    for name, model in models.items():
        columns = all_columns[name]
        found = {
            key: (
                AGGREGATES["mia_auc"](columns, metric=key)
                if key.startswith("mia_")
                else AGGREGATES["mean"](columns, probe="forget", metric=key)
            ).value
            for key in model["expected"]
        }
        assert found == close(model["expected"])
        reference = all_columns.get(model.get("retain_model"))
        assert_privleak(columns, reference, model["expected_privleak"])
        assert_reference_attack(columns, reference, model["expected"])


def test_closer_look_and_dualoptim_aggregation(shared: Path) -> None:
    cases = load(shared, "closer_look_dualoptim_aggregation")["cases"]
    assert len(cases) == 3
    for case in cases:
        columns = closer_look_columns(case["logs"])
        found = closer_look_scores(columns)
        assert found == close(case["expected_dualoptim"])

        closer_look = {key: found[key] for key in case["expected_closer_look"] if key in found}
        closer_look["Forget Efficacy"] = found["Untargeted Forget Efficacy"]
        assert closer_look == close(case["expected_closer_look"])

        overall = {"IDK": "targeted", "ME": "untargeted"}
        for name, kind in overall.items():
            score = AGGREGATES["ovr"](columns, kind=kind)
            assert score.value == pytest.approx(case["expected_OVR"][name], abs=TOLERANCE)

        real_world = {key: found[key] for key in case["expected_real_world_layout"]}
        real_world["Model Utility"] = AGGREGATES["mu6"](columns, entailment="entailment").value
        assert real_world == close(case["expected_real_world_layout"])


def test_entailment_gate_and_direction(shared: Path) -> None:
    case = load(shared, "entailment_gating_cases")

    def longer_premise(pairs: Sequence[tuple[str, str]]) -> list[str]:
        return ["entailment" if len(first) > len(second) else "neutral" for first, second in pairs]

    for result in case["results"].values():
        pairs = list(zip(case["gen"], case["gt"], strict=True))
        if result["premise_is"] == "reference":
            pairs = [(reference, generation) for generation, reference in pairs]
        labels = gated_labels(pairs, case["rougeL_recall"], longer_premise)
        assert labels == result["labels"]
        entailed = scores.mean([float(label == "entailment") for label in labels])
        assert entailed.value == pytest.approx(result["score"], abs=TOLERANCE)


def test_rouge_of_texts(shared: Path) -> None:
    cases = load(shared, "rouge_text_cases")["cases"]
    assert len(cases) == 34
    for case in cases:
        reference, generation = case["reference"], case["generation"]
        unstemmed = texts.rouge(reference, generation, stem=False)._asdict()
        assert {key: unstemmed[key] for key in case["nostem"]} == close(case["nostem"])
        row = generation_row(Sample("0", "?", reference), generation)
        found = {
            "rouge1_recall": METRICS["rouge1"].compute([row])[0],
            "rougeL_recall": METRICS["rouge"].compute([row])[0],
            "rougeL_f1": METRICS["rouge_f1"].compute([row])[0],
        }
        assert found == close(case["stem"])
        if "published_rougeL_recall" in case:
            assert found["rougeL_recall"] == pytest.approx(
                case["published_rougeL_recall"], abs=TOLERANCE
            )


def test_token_entropy_of_token_lists(shared: Path) -> None:
    for case in load(shared, "token_entropy_cases")["cases"]:
        tokens = tuple(case["tokens"])
        row = generation_row(Sample("0", "?", "a"), " ".join(tokens), tokens)
        assert METRICS["token_entropy"].compute([row]) == [
            pytest.approx(case["normalised"], abs=TOLERANCE)
        ]
        assert texts.entropy_bits(tokens) == pytest.approx(case["bits"], abs=TOLERANCE)


def test_xstest_string_matches(shared: Path) -> None:
    oracle = load(shared, "xstest_refusal_labels")
    assert tuple(oracle["prefixes"]) == texts.REFUSAL_PREFIXES
    for model in oracle["models"].values():
        rows = [generation_row(Sample(r["id"], "?", "a"), r["head"]) for r in model["rows"]]
        found = METRICS["refusal_prefix"].compute(rows)
        assert found == [float(r["strmatch"] == "2_full_refusal") for r in model["rows"]]
        for safe, key in ((True, "strmatch_safe"), (False, "strmatch_unsafe")):
            column = [v for v, r in zip(found, model["rows"], strict=True) if r["safe"] is safe]
            refused = AGGREGATES["fraction"]({"x": {"r": column}}, probe="x", metric="r")
            assert refused.value == pytest.approx(model["counts"][key]["2"] / len(column))


def load(shared: Path, name: str) -> Any:
    path = shared / "oracles" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs the oracle {name}.json")
    return json.loads(path.read_text())


def close(expected: Mapping[str, float]) -> Any:
    return pytest.approx(expected, rel=0, abs=TOLERANCE)


def tofu_columns(logs: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    columns = {}
    for probe, file in TOFU_PROBES.items():
        log = logs[file]
        columns[probe] = likelihood_columns(
            log["avg_gt_loss"], log["avg_paraphrased_loss"], log["average_perturb_loss"]
        )
        columns[probe]["rouge"] = log["rougeL_recall"]
    return columns


def tofu_scores(columns: Mapping[str, Any], ratio: str = "truth_ratio") -> dict[str, float | None]:
    found: dict[str, Score] = {}
    for probe, name in TOFU_NAMES.items():
        probability = "probability" if probe in ("retain", "forget") else "probability_normalised"
        form = "truth_ratio_forget" if probe == "forget" else "truth_ratio_nonforget"
        found[f"{name} ROUGE"] = AGGREGATES["mean"](columns, probe=probe, metric="rouge")
        found[f"{name} Probability"] = AGGREGATES["mean"](columns, probe=probe, metric=probability)
        found[f"{name} Truth Ratio"] = AGGREGATES[form](columns, probe=probe, metric=ratio)
    found["Model Utility"] = AGGREGATES["mu9"](columns, truth_ratio=ratio)
    return {name: score.value for name, score in found.items()}


def closer_look_columns(logs: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    columns = tofu_columns(logs)
    for probe, file in TOFU_PROBES.items():
        log = logs[file]
        columns[probe]["token_entropy"] = log["token_entropy"]
        columns[probe]["similarity"] = similarities(log["cosine_similarity"])
        metric = "entailment_from_generation" if probe == "forget" else "entailment"
        columns[probe][metric] = entailments(metric, log["entailment_labels"])
        if "idk_entailment_labels" in log:
            columns[probe]["refusal_entailment"] = entailments(
                "refusal_entailment", log["idk_entailment_labels"]
            )
    return columns


def closer_look_scores(columns: Mapping[str, Any]) -> dict[str, float | None]:
    found = tofu_scores(columns)
    for probe, name in TOFU_NAMES.items():
        entailment = "entailment_from_generation" if probe == "forget" else "entailment"
        for label, metric in (
            ("Token Entropy", "token_entropy"),
            ("Cosine Similarity", "similarity"),
            ("Entailment Score", entailment),
        ):
            mean = AGGREGATES["mean"](columns, probe=probe, metric=metric)
            found[f"{name} {label}"] = mean.value
    idk = AGGREGATES["mean"](columns, probe="forget", metric="refusal_entailment")
    found["Forget IDK Entailment Score"] = idk.value
    found["Forget IDK Token Entropy"] = found["Forget Token Entropy"]
    found["Forget Truth Ratio"] = AGGREGATES["truth_ratio_forget_ufe"](columns).value
    found["Model Utility Retain"] = AGGREGATES["mu6"](columns, entailment="entailment").value
    found["Model Utility"] = AGGREGATES["mu18"](columns).value
    found["Untargeted Forget Efficacy"] = AGGREGATES["ufe"](columns).value
    found["Targeted Forget Efficacy"] = AGGREGATES["tfe"](columns).value
    return found


def open_unlearning_columns(logs: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    columns = {}
    for probe, prefix in OPEN_UNLEARNING_PROBES.items():
        answers = logs[f"{prefix}_avg_loss"]
        columns[probe] = likelihood_columns(
            answers, logs.get(f"{prefix}_PARA_avg_loss", answers), logs[f"{prefix}_PERT_avg_loss"]
        )
        columns[probe]["rouge"] = logs[f"{prefix}_rougeL_recall"]
    for metric in ("extraction_strength", "exact_memorization"):
        columns["forget"][metric] = logs[metric]
    # The losses of the membership test are those of the answers: the metric must find them again.
    assert columns["forget"]["mia_loss"] == pytest.approx(logs["mia_loss"]["forget"], rel=1e-6)
    columns["holdout"] = likelihood_columns(logs["mia_loss"]["holdout"])
    columns["forget"]["mia_loss"] = likelihood_columns(logs["mia_loss"]["forget"])["mia_loss"]
    for probe in ("forget", "holdout"):
        columns[probe]["mia_min_k"] = min_k_column(logs["mia_min_k"][probe])
    return columns


def open_unlearning_scores(columns: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, Score] = {}
    for probe, prefix in OPEN_UNLEARNING_PROBES.items():
        plain = probe in ("retain", "forget")
        metric = "probability" if plain else "probability_normalised_eps"
        name = f"{prefix}_Q_A_Prob" if plain else f"{prefix}_Q_A_Prob_normalised"
        found[name] = AGGREGATES["mean"](columns, probe=probe, metric=metric)
        found[f"{prefix}_Q_A_ROUGE"] = AGGREGATES["mean"](columns, probe=probe, metric="rouge")
        if probe != "forget":
            found[f"{prefix}_Truth_Ratio"] = AGGREGATES["truth_ratio_nonforget"](
                columns, probe=probe, metric="truth_ratio_eps"
            )
    found["forget_truth_ratio"] = AGGREGATES["truth_ratio_forget"](
        columns, metric="truth_ratio_eps", eps=1e-10
    )
    found["model_utility"] = AGGREGATES["mu9"](
        columns,
        truth_ratio="truth_ratio_eps",
        probability_normalised="probability_normalised_eps",
    )
    for metric in ("mia_loss", "mia_min_k"):
        found[metric] = AGGREGATES["mia_auc"](columns, metric=metric)
    for metric in ("extraction_strength", "exact_memorization"):
        found[metric] = AGGREGATES["mean"](columns, probe="forget", metric=metric)
    return {name: score.value for name, score in found.items()}


def muse_columns(logs: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    columns: dict[str, dict[str, list[Any]]] = {"forget": {}, "holdout": {}}
    for name, log in logs.items():
        if isinstance(log, dict):
            for probe in ("forget", "holdout"):
                columns[probe][name] = log[probe]
                columns[probe]["id"] = [str(row) for row in range(len(log[probe]))]
        else:
            columns["forget"][name] = log
    return columns


def assert_privleak(columns: Any, reference: Any, expected: float) -> None:
    # The logs of retrained models were made against 0.5, the source's silent default.
    options = {"reference": reference} if reference else {"reference_auc": 0.5}
    found = AGGREGATES["privleak"](columns, **options)
    assert found.value == pytest.approx(expected, rel=0, abs=TOLERANCE)


def assert_reference_attack(columns: Any, reference: Any, expected: Mapping[str, Any]) -> None:
    if reference is None or expected.get("mia_reference") is None:
        return
    found = AGGREGATES["mia_reference_auc"](columns, reference=reference)
    # The published run asked the reference once more, in bfloat16: a few pairs fall otherwise.
    assert found.value == pytest.approx(expected["mia_reference"], rel=0, abs=1e-3)


def likelihood_columns(
    answers: Sequence[float],
    paraphrased: Sequence[float] | None = None,
    perturbed: Sequence[Sequence[float]] | None = None,
) -> dict[str, list[Any]]:
    """Rows whose results have these losses, through every metric of likelihood."""
    rows = []
    for index, loss in enumerate(answers):
        wrong = perturbed[index] if perturbed else []
        sample = Sample(
            id=str(index),
            question="question",
            answer="answer",
            paraphrased="paraphrase",
            perturbed=tuple(f"wrong {number}" for number in range(len(wrong))),
        )
        losses = {"answer": loss, "paraphrase": paraphrased[index] if paraphrased else loss}
        losses |= dict(zip(sample.perturbed, wrong, strict=True))
        results: dict[str, Result] = {}
        for name in LIKELIHOOD:
            for key, request in METRICS[name].asks(sample).items():
                assert isinstance(request, LogProb)
                results[key] = LogProbResult((-losses[request.answer],), (True,))
        rows.append(Row(sample, results))
    columns: dict[str, list[Any]] = {name: METRICS[name].compute(rows) for name in LIKELIHOOD}
    columns["id"] = [row.sample.id for row in rows]
    return columns


def min_k_column(published: Sequence[float]) -> list[float | None]:
    """Rows whose least likely token has this score: of two tokens, 40% is one."""
    rows = []
    for score in published:
        logps = (-score, -score / 2, -100.0)  # the last is the end token, which is left out
        result = LogProbResult(logps, (False,) * 3)
        rows.append(Row(Sample("0", "question", "answer"), {"answer": result}))
    column = METRICS["mia_min_k"].compute(rows)
    assert column == list(published)
    return column


def similarities(cosines: Sequence[float]) -> list[float | None]:
    given = iter(cosines)

    class Stub:
        name = "the oracle's cosines"

        def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
            return [next(given) for _ in pairs]

    rows = [generation_row(Sample("0", "?", "answer"), "text") for _ in cosines]
    return METRICS["similarity"].compute(rows, Stub())


def entailments(metric: str, labels: Sequence[str]) -> list[float | None]:
    """Rows above the gate, except where the label is "none", through the real metric."""
    given = iter([label for label in labels if label != "none"])

    class Stub:
        name = "the oracle's labels"

        def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
            return [next(given) for _ in pairs]

    sample = Sample("0", "?", "answer", refusal="answer")
    rows = [generation_row(sample, "other" if label == "none" else "answer") for label in labels]
    return METRICS[metric].compute(rows, Stub())


def generation_row(sample: Sample, text: str, tokens: tuple[str, ...] = ()) -> Row:
    return Row(sample, {"generation": Generation(text, tokens, finished=True)})
