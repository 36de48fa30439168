"""Other projects' formats: read, written, and read again."""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData
from scipy.stats import hmean, ks_2samp

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import read_private_records, write_records
from unlearn_llm.exchange import open_unlearning
from unlearn_llm.exchange.commands import export_folder, import_file

# The oracle's probabilities are exp(-loss) of the losses in the file, computed in float32.
FLOAT32 = 2**-24
PREFIXES = ("forget", "retain", "ra", "wf")
PUBLISHED = {  # their name of a score: how exactly the rows give it
    "model_utility": 1e-6,
    "forget_truth_ratio": 1e-9,
    "forget_Q_A_Prob": FLOAT32,
    "retain_Q_A_Prob": FLOAT32,
    "forget_Q_A_ROUGE": 1e-12,
    "retain_Q_A_ROUGE": 1e-12,
    "ra_Q_A_ROUGE": 1e-12,
    "wf_Q_A_ROUGE": 1e-12,
    "ra_Q_A_Prob_normalised": 1e-6,
    "wf_Q_A_Prob_normalised": 1e-6,
    "ra_Truth_Ratio": 1e-9,
    "wf_Truth_Ratio": 1e-9,
    "retain_Truth_Ratio": 1e-9,
    "extraction_strength": 1e-12,
    "exact_memorization": 1e-12,
    "mia_loss": 1e-12,
    "mia_min_k": 1e-12,
}


def rows_of(values: list[Any], **named: Any) -> dict[str, Any]:
    return {
        "value_by_index": {
            str(i): {n: f(v) for n, f in named.items()} for i, v in enumerate(values)
        }
    }


def log_of(oracle: dict[str, Any]) -> dict[str, Any]:
    """Lay the oracle's arrays out as TOFU_EVAL.json has them; truth ratios are left to us."""

    def probability(loss: Any) -> Any:
        return [math.exp(-each) for each in loss] if isinstance(loss, list) else math.exp(-loss)

    log: dict[str, Any] = {}
    for prefix in PREFIXES:
        for kind in ("", "PARA_", "PERT_"):
            losses = oracle.get(f"{prefix}_{kind}avg_loss")
            if losses is not None:
                name = f"{prefix}_Q_A_{kind}Prob"
                log[name] = rows_of(losses, prob=probability, avg_loss=lambda loss: loss)
        recalls = oracle[f"{prefix}_rougeL_recall"]
        log[f"{prefix}_Q_A_ROUGE"] = rows_of(recalls, rougeL_recall=lambda value: value)
    for name in ("extraction_strength", "exact_memorization"):
        log[name] = rows_of(oracle[name], score=lambda value: value)
    for name in ("mia_loss", "mia_min_k"):
        sides = oracle[name].items()
        log[name] = {side: rows_of(values, score=lambda value: value) for side, values in sides}
    return log


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict[str, Any]:
    text = (shared / "oracles" / "open_unlearning_tofu_eval_logs.json").read_text()
    return json.loads(text)["models"]


@pytest.fixture(scope="module")
def logs(oracle, tmp_path_factory) -> Path:
    """A folder with one TOFU_EVAL.json per model and split of the oracle."""
    folder = tmp_path_factory.mktemp("logs")
    for name, model in oracle.items():
        file = folder / name.replace("/", "-") / "TOFU_EVAL.json"
        file.parent.mkdir()
        file.write_text(json.dumps(log_of(model["logs"])))
    return folder


def test_imported_logs_give_the_published_scores(oracle, logs, tmp_path):
    for name, model in oracle.items():
        file = logs / name.replace("/", "-") / "TOFU_EVAL.json"
        retain = model.get("retain_model")
        reference = logs / retain / "TOFU_EVAL.json" if retain else None
        found = import_file(file, "open-unlearning", tmp_path / name, reference)
        for score, tolerance in PUBLISHED.items():
            expected = model["expected"][score]
            assert found[score]["value"] == pytest.approx(expected, abs=tolerance), (name, score)
        if retain:
            for score in ("forget_quality", "privleak"):
                expected = model[f"expected_{score}"]
                assert found[score]["value"] == pytest.approx(expected, rel=1e-6), (name, score)


def test_scores_of_an_import_are_recomputed_by_eval(oracle, logs, tmp_path, capsys, monkeypatch):
    from unlearn_llm import cli

    name = "tofu_Llama-3.2-1B-Instruct_full/evals_forget01"
    retain = logs / oracle[name]["retain_model"] / "TOFU_EVAL.json"
    import_file(retain, "open-unlearning", tmp_path / "retain")
    file = logs / name.replace("/", "-") / "TOFU_EVAL.json"
    monkeypatch.chdir(tmp_path)
    arguments = ["import", str(file), "--output", "full", "--reference", "retain/records.jsonl"]
    monkeypatch.setattr("sys.argv", ["unlearn", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert "forget_quality         0.0067607" in capsys.readouterr().out
    # A gold model that was measured by another suite of ours will do as well.
    lines = (tmp_path / "retain" / "records.jsonl").read_text().splitlines()
    plain = [json.loads(line) for line in lines]
    for row in plain:
        row["metrics"].pop("truth_ratio_eps", None)
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    found = import_file(file, "open-unlearning", tmp_path / "twin", tmp_path / "plain.jsonl")
    expected = oracle[name]["expected_forget_quality"]
    assert found["forget_quality"]["value"] == pytest.approx(expected, rel=1e-6)
    again = ["eval", "--from", "full", "--reference", "retain/records.jsonl", "--json"]
    monkeypatch.setattr("sys.argv", ["unlearn", *again])
    with pytest.raises(SystemExit):
        cli.main()
    (scores,) = json.loads(capsys.readouterr().out).values()
    kept = json.loads((tmp_path / "full" / "scores.json").read_text())["scores"]
    assert scores["model_utility"]["value"] == kept["model_utility"]["value"]
    assert scores["forget_quality"]["value"] == kept["forget_quality"]["value"]


# Records of ours: two rows of each of TOFU's four probes.


def record(probe: str, row: int, text: str = "She wrote novels in Oslo.") -> dict[str, Any]:
    plain = probe in ("forget", "retain")
    losses = {
        "answer": 0.1 * (row + 1),
        "paraphrased": 0.5 * (row + 1) if plain else 0.1 * (row + 1),
    }
    wrong = {f"perturbed/{i}": 1.0 + 0.3 * i + row for i in range(3)}
    right = losses["paraphrased"]
    share = 1 / (1 + sum(math.exp(losses["answer"] - loss) for loss in wrong.values()))
    metrics = {
        "rouge": 0.6,
        "truth_ratio": math.exp(right - sum(wrong.values()) / 3),
        "probability" if plain else "probability_normalised": math.exp(-losses["answer"])
        if plain
        else share,
    }
    if probe == "forget":
        metrics |= {"extraction_strength": 0.25, "exact_memorization": 0.75}
    return {
        "probe": probe,
        "id": str(row),
        "question": "Where did she write?",
        "answer": "She wrote plays in Bergen.",
        "reference": None,
        "generation": {"text": text, "tokens": 6, "finished": True},
        "results": {k: {"loss": v, "tokens": 7} for k, v in (losses | wrong).items()},
        "metrics": metrics,
    }


PROBES = ("forget", "retain", "real_authors", "world_facts")


@pytest.fixture
def evaluation(tmp_path) -> Path:
    """A run's folder with records, and a gold model's records."""
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    rows = [record(probe, row) for probe in PROBES for row in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "evaluation" / "records.jsonl").write_text(lines)
    gold = [row | {"metrics": {**row["metrics"], "truth_ratio": 0.9}} for row in rows]
    gold_file = tmp_path / "gold.jsonl"
    gold_file.write_text("".join(json.dumps(row) + "\n" for row in gold))
    details = {
        "scores": {
            "UFE_proxy": {"value": 0.5, "n": None, "note": None, "aggregate": "ufe"},
            "MU9": {"value": 0.4, "n": None, "note": None, "aggregate": "mu9"},
            "TFE": {"value": None, "n": None, "note": "no judge", "aggregate": "tfe"},
            "forget/rouge": {"value": 0.6, "n": 2, "note": None, "aggregate": "mean"},
        },
        "suite": {"name": "tofu", "split": "forget01", "limit": 300},
        "model": {"name": "target"},
        "reference": str(gold_file),
    }
    (folder / "evaluation" / "scores.json").write_text(json.dumps(details))
    recipe = {
        "kind": "unlearn",
        "model": {"path": "locuslab/tofu_ft_phi-1.5"},
        "train": {"objective": "npo+gd", "optimizer": "dual_adamw_plus"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def test_a_log_of_ours_is_what_open_unlearning_reads(evaluation):
    log = json.loads(export_folder(evaluation, "open-unlearning", show_forget_text=True))
    assert list(log) == sorted(log)
    # What its forget_quality, hm_aggregate and probability_w_options take from a log.
    ratios = [row["score"] for row in log["forget_truth_ratio"]["value_by_index"].values()]
    expected = [math.exp(-(1.3 + row)) / (math.exp(-0.5 * (row + 1)) + 1e-10) for row in range(2)]
    assert ratios == pytest.approx(expected)
    members = [
        f"{prefix}_{name}"
        for prefix, probability in (
            ("retain", "Q_A_Prob"),
            ("ra", "Q_A_Prob_normalised"),
            ("wf", "Q_A_Prob_normalised"),
        )
        for name in (probability, "Q_A_ROUGE", "Truth_Ratio")
    ]
    utility = hmean([log[name]["agg_value"] for name in members])
    assert log["model_utility"]["agg_value"] == pytest.approx(utility)
    assert log["forget_quality"]["agg_value"] == pytest.approx(ks_2samp(ratios, ratios).pvalue)
    row = log["forget_Q_A_PERT_Prob"]["value_by_index"]["1"]
    assert row["avg_loss"] == [2.0, 2.3, 2.6]
    assert row["prob"] == pytest.approx([math.exp(-loss) for loss in row["avg_loss"]])
    text = log["forget_Q_A_ROUGE"]["value_by_index"]["0"]
    assert text["rougeL_recall"] == pytest.approx(3 / 5)  # she wrote (plays) in (Bergen)
    assert (text["ground_truth"], text["generation"]) == (
        "She wrote plays in Bergen.",
        "She wrote novels in Oslo.",
    )
    assert "ra_Q_A_PARA_Prob" not in log


def test_what_is_exported_comes_back(evaluation, tmp_path):
    file = tmp_path / "TOFU_EVAL.json"
    text = export_folder(evaluation, "open-unlearning", show_forget_text=True)
    file.write_text(text)
    import_file(file, "open-unlearning", tmp_path / "again")
    before = read_private_records(evaluation / "evaluation")
    after = read_private_records(tmp_path / "again")
    assert [(row["probe"], row["id"]) for row in after] == [
        (row["probe"], row["id"]) for row in before
    ]
    for one, other in zip(before, after, strict=True):
        assert one["question"] == other["question"] and one["answer"] == other["answer"]
        assert one["generation"]["text"] == other["generation"]["text"]
        losses = {name: result["loss"] for name, result in one["results"].items()}
        assert losses == {name: result["loss"] for name, result in other["results"].items()}
        for name, value in one["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=1e-12), name
    written = open_unlearning.from_records(after, after, show_forget_text=True)
    assert {**json.loads(text), "forget_quality": 0} == {**written, "forget_quality": 0}


def test_texts_are_exported_only_if_one_asks_for_them(evaluation):
    log = export_folder(evaluation, "open-unlearning")
    rows = json.loads(log)["forget_Q_A_ROUGE"]["value_by_index"]
    assert rows["0"] == {
        "rouge1_recall": pytest.approx(3 / 5),
        "rougeL_f1": pytest.approx(3 / 5),
        "rougeL_recall": pytest.approx(3 / 5),
    }
    for text in ("Bergen", "Oslo", "question"):
        assert text not in log


def test_an_evaluation_without_its_texts_is_exported_with_what_was_taken(evaluation, tmp_path):
    place, file = evaluation / "evaluation", tmp_path / "log.json"
    whole = json.loads(export_folder(evaluation, "open-unlearning"))
    write_records(place, read_private_records(place))
    shutil.rmtree(place / "private")
    file.write_text(export_folder(evaluation, "open-unlearning"))
    log = json.loads(file.read_text())
    row = log["forget_Q_A_ROUGE"]["value_by_index"]["0"]
    assert row == {"rougeL_recall": 0.6}  # as the records say
    assert log["forget_truth_ratio"] == whole["forget_truth_ratio"]
    import_file(file, "open-unlearning", tmp_path / "again")
    again = open_unlearning.from_records(read_private_records(tmp_path / "again"))
    assert again["retain_Q_A_ROUGE"] == log["retain_Q_A_ROUGE"]


def test_tofus_leaderboard_gets_its_columns(shared, tmp_path):
    """Published logs through our records give the numbers of the official aggregation."""
    from unlearn_llm.exchange.losses import Losses
    from unlearn_llm.exchange.tofu_csv import COLUMNS, tofu_csv

    oracle = json.loads((shared / "oracles" / "tofu_locuslab_eval_logs.json").read_text())
    model = next(iter(oracle["models"].values()))
    files = {
        "retain": "eval_log.json",
        "real_authors": "eval_real_author_wo_options.json",
        "world_facts": "eval_real_world_wo_options.json",
        "forget": "eval_log_forget.json",
    }
    records = []
    for probe, file in files.items():
        log = model["logs"][file]
        keys = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
        for row, values in enumerate(zip(*(log[key] for key in keys), strict=True)):
            answer, right, wrong, rouge = values
            metrics = Losses(answer, right, wrong).metrics() | {"rouge": rouge}
            records.append({"probe": probe, "id": str(row), "metrics": metrics})
    written = tofu_csv(records, records, method="=SUM(A1)", submitted_by="me, myself")
    (row,) = csv.DictReader(io.StringIO(written))
    assert tuple(row) == COLUMNS and len(COLUMNS) == 17
    assert float(row["Forget Quality"]) == 1.0
    assert row["Submitted By"] == "me, myself" and row["Method"] == "'=SUM(A1)"
    found = {key: float(row[key]) for key in COLUMNS[3:] if key != "Forget Quality"}
    official = model["expected"]["aggregate_eval_stat_py"]
    expected = {"Model Utility": official["Model Utility"]}
    for name in ("Real Authors", "Real World", "Retain", "Forget"):
        expected[f"ROUGE {name}"] = official[f"{name} ROUGE"]
        expected[f"Prob. {name}"] = official[f"{name} Probability"]
        expected[f"Truth Ratio {name}"] = official[f"{name} Truth Ratio"]
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_model_card_gets_every_measured_score(evaluation):
    text = export_folder(evaluation, "model-index")
    assert text.startswith("---\n") and text.endswith("\n---\n")
    card = ModelCardData(**yaml.safe_load(text.strip("-\n")))
    assert card.base_model == "locuslab/tofu_ft_phi-1.5" and card.tags == ["unlearning"]
    assert card.model_name == "npo+gd dual_adamw_plus"
    found = {result.metric_name: result for result in card.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "UFE_proxy": 0.5,
        "MU9": 0.4,
    }
    assert found["MU9"].dataset_type == "locuslab/TOFU"
    assert found["MU9"].dataset_config == "forget01_perturbed"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["TOFU_EVAL.json"]),
        ('{"forget_Q_A_Prob": 0.1}', ["TOFU_SUMMARY.json has no rows"]),
    ],
)
def test_a_file_that_is_none_of_theirs_is_refused(tmp_path, text, words):
    file = tmp_path / "log.json"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        import_file(file, "open-unlearning", tmp_path / "out")
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_an_export_says_what_it_lacks(evaluation, tmp_path):
    with pytest.raises(UserError, match="expected tofu-csv or open-unlearning or model-index"):
        export_folder(evaluation, "tofu_csv")
    with pytest.raises(UserError, match="There is no file"):
        export_folder(tmp_path / "nowhere", "tofu-csv")
    details = json.loads((evaluation / "evaluation" / "scores.json").read_text())
    (evaluation / "evaluation" / "scores.json").write_text(
        json.dumps(details | {"reference": None})
    )
    with pytest.raises(UserError, match="needs Forget Quality: not measured, no reference"):
        export_folder(evaluation, "tofu-csv")
    lines = (evaluation / "evaluation" / "records.jsonl").read_text().splitlines()
    (evaluation / "evaluation" / "records.jsonl").write_text("\n".join(lines[:4]))
    with pytest.raises(UserError, match="these records lack real_authors, world_facts"):
        export_folder(evaluation, "open-unlearning")


def test_rows_that_a_log_lacks_are_not_measured_and_not_zero(tmp_path):
    log = {
        "forget_Q_A_Prob": {"value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.7}, "1": None}},
        "forget_Q_A_PARA_Prob": {"value_by_index": {"0": {"prob": None, "avg_loss": float("nan")}}},
        "forget_Q_A_PERT_Prob": {"value_by_index": {"0": {"avg_loss": [1.0, None]}}},
    }
    first, second = open_unlearning.to_records(log)
    assert first["metrics"]["probability"] == 0.5 and "truth_ratio" not in first["metrics"]
    assert second["metrics"] == {} and second["results"] == {}
