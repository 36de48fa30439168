"""open-unlearning's TOFU_EVAL.json, read into our records and written from them.

Source: locuslab/open-unlearning@d3d7cf9 src/evals/metrics (names and fields). A file of theirs
    holds, per metric, `agg_value` and `value_by_index`, which maps the number of a row to numbers.
Differs: rows keep the prompt with its template as `question`, because the file has no other; no
    metric of a judge can be made of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation import texts
from unlearn_llm.evaluation.evaluate import score_all
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.records import Record, columns_of
from unlearn_llm.evaluation.suite import Probe, ScoreOf, Suite, as_plain
from unlearn_llm.exchange.losses import Losses, finite

SUITE = "open_unlearning"
PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
TRUTH_RATIOS = {"forget": "forget_truth_ratio"}
FACTS = ("real_authors", "world_facts")
"""Their answers have no paraphrase: the answer takes its place."""
MEMBERSHIP = "mia_"
ROUGE = {"rougeL_recall": "rouge", "rouge1_recall": "rouge1", "rougeL_f1": "rouge_f1"}
OF_ANSWER = ("extraction_strength", "exact_memorization")
SPLIT_OF_ROWS = {40: "forget01", 200: "forget05", 400: "forget10"}

ByIndex = Mapping[str, Mapping[str, Any] | None]


def read_log(path: Path) -> dict[str, Any]:
    """Read a TOFU_EVAL.json.

    Raises:
        UserError: no such file, or not one of theirs.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        raise UserError(f"{path}: {problem}; expected a TOFU_EVAL.json.") from error
    if not isinstance(log, dict) or not _by_index(log, "forget_Q_A_Prob"):
        raise UserError(
            f"{path}: expected open-unlearning's TOFU_EVAL.json, with forget_Q_A_Prob and its "
            "value_by_index; the file TOFU_SUMMARY.json has no rows."
        )
    return log


def to_records(log: Mapping[str, Any]) -> list[Record]:
    """Make our records of a log: one per probe and row."""
    records = []
    for probe, prefix in PREFIXES.items():
        indices = dict.fromkeys([*_by_index(log, f"{prefix}_Q_A_Prob")])
        records += [_record(log, probe, index) for index in indices]
    attacks = _attacks(log)
    held_out = (index for name in attacks for index in log[name]["holdout"]["value_by_index"])
    for index in dict.fromkeys(held_out):
        records.append(_bare("holdout", index) | {"metrics": _membership(log, "holdout", index)})
    return records


def suite_of(log: Mapping[str, Any], reference: str | None = None) -> Suite:
    """Give the suite that the records of a log belong to, with the attacks that the log has."""
    rows = len(_by_index(log, "forget_Q_A_Prob"))
    suite = Suite.load(SUITE, split=SPLIT_OF_ROWS.get(rows, f"{rows} rows"), reference=reference)
    attacks = _attacks(log)
    if not attacks:
        return suite
    known = [name for name in attacks if name in METRICS]
    scores = {name: ScoreOf(aggregate="mia_auc", options={"metric": name}) for name in attacks}
    if "mia_min_k" in attacks:
        scores["privleak"] = ScoreOf(aggregate="privleak")
    holdout = Probe(source="tofu/holdout", metrics=known)
    return suite.model_copy(
        update={
            "probes": {**suite.probes, "holdout": holdout},
            "scores": {**suite.scores, **scores},
        }
    )


def details_of(
    log: Mapping[str, Any],
    path: Path,
    records: Sequence[Record],
    reference: Sequence[Record] | None,
) -> dict[str, Any]:
    """Make what scores.json holds: the scores, recomputed from the rows, and of what."""
    suite = suite_of(log)
    compared = columns_of(reference) if reference is not None else None
    scores = score_all(suite, columns_of(records), compared)
    made_of = suite.scores.values()
    return {
        "scores": {
            name: {**asdict(score), "aggregate": of.aggregate}
            for (name, score), of in zip(scores.items(), made_of, strict=True)
        },
        "not_measured": {},
        "judges": {},
        "suite": as_plain(suite),
        "model": {"name": path.parent.name or path.stem},
        "reference": None,
        "imported": {
            "format": "open-unlearning",
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
    }


def from_records(
    records: Sequence[Record],
    reference: Sequence[Record] | None = None,
    show_forget_text: bool = False,
) -> dict[str, Any]:
    """Make a log of our records, which open-unlearning's code reads as its own.

    Args:
        records: Of a suite with TOFU's four probes, such as tofu or open_unlearning.
        reference: Of a model that never saw the forget set, for forget_quality.
        show_forget_text: Write the texts of the rows, too; their code reads none.

    Raises:
        UserError: a probe is missing, or rows have no losses or generations.
    """
    by_probe: dict[str, list[Record]] = {}
    for record in records:
        by_probe.setdefault(record["probe"], []).append(record)
    missing = [probe for probe in PREFIXES if probe not in by_probe]
    if missing:
        raise UserError(
            f"open-unlearning's file holds the probes {', '.join(PREFIXES)}; these records lack "
            f"{', '.join(missing)}. Evaluate with --suite tofu or --suite {SUITE}."
        )
    log: dict[str, Any] = {}
    for probe in PREFIXES:
        log |= _of_probe(probe, by_probe[probe], show_forget_text)
    if "holdout" in by_probe:
        log |= _both_sides(by_probe["forget"], by_probe["holdout"])
    _aggregate(log, reference)
    return dict(sorted(log.items()))


def _both_sides(forget: Sequence[Record], holdout: Sequence[Record]) -> dict[str, Any]:
    """Give the membership scores that were taken on both sides."""
    taken = [name for name in forget[0]["metrics"] if name.startswith(MEMBERSHIP)]
    return {
        name: {
            "forget": {"value_by_index": _scores(forget, name)},
            "holdout": {"value_by_index": _scores(holdout, name)},
        }
        for name in taken
        if name in holdout[0]["metrics"]
    }


def _aggregate(log: dict[str, Any], reference: Sequence[Record] | None) -> None:
    """Put the scores of the suite into a log; those without rows of their own are added."""
    again = to_records(log)
    compared = None if reference is None else columns_of(to_records(from_records(reference)))
    scores = score_all(suite_of(log), columns_of(again), compared)
    for name, score in scores.items():
        log.setdefault(name, {})["agg_value"] = score.value
        if name.startswith(MEMBERSHIP):
            log[name]["auc"] = score.value


def _of_probe(probe: str, records: Sequence[Record], show_texts: bool) -> dict[str, Any]:
    prefix, facts = PREFIXES[probe], probe in FACTS
    losses = {record["id"]: Losses.of_record(record) for record in records}
    metrics = {row: found.metrics() for row, found in losses.items()}
    lacking = [row for row, found in metrics.items() if "truth_ratio_eps" not in found]
    if lacking or any(record.get("generation") is None for record in records):
        raise UserError(
            f"Probe {probe!r}: rows without the losses of right and wrong answers, or without a "
            "generation. Evaluate with --suite tofu or --suite open_unlearning."
        )
    log = {
        f"{prefix}_Q_A_Prob": {row: _prob(found.answer) for row, found in losses.items()},
        f"{prefix}_Q_A_PERT_Prob": {
            row: {
                "prob": [_prob(loss)["prob"] for loss in found.perturbed],
                "avg_loss": list(found.perturbed),
            }
            for row, found in losses.items()
        },
        f"{prefix}_Q_A_ROUGE": {record["id"]: _rouge(record, show_texts) for record in records},
        _truth_ratio(probe): {
            row: {"score": found["truth_ratio_eps"]} for row, found in metrics.items()
        },
    }
    if facts:
        log[f"{prefix}_Q_A_Prob_normalised"] = {
            row: {"prob": found["probability_normalised_eps"]} for row, found in metrics.items()
        }
    else:
        log[f"{prefix}_Q_A_PARA_Prob"] = {
            row: _prob(found.paraphrased) for row, found in losses.items()
        }
    if probe == "forget":
        log |= {name: _scores(records, name) for name in OF_ANSWER if name in records[0]["metrics"]}
    return {name: {"value_by_index": rows} for name, rows in log.items()}


def _prob(loss: float | None) -> dict[str, float | None]:
    found = Losses(answer=loss).metrics()
    return {"prob": found.get("probability"), "avg_loss": loss}


def _rouge(record: Record, show_texts: bool) -> dict[str, Any]:
    """Give ROUGE, of the texts where they are at hand, else as far as it was taken."""
    if "text" not in record["generation"]:
        metrics = record["metrics"]
        return {theirs: metrics[ours] for theirs, ours in ROUGE.items() if ours in metrics}
    text = record["generation"]["text"]
    scored = texts.rouge(record["answer"], text)
    found: dict[str, Any] = {name: getattr(scored, name) for name in ROUGE}
    if show_texts:
        found |= {"input": record["question"], "ground_truth": record["answer"], "generation": text}
    return found


def _scores(records: Sequence[Record], metric: str) -> dict[str, dict[str, float | None]]:
    return {record["id"]: {"score": record["metrics"].get(metric)} for record in records}


def _record(log: Mapping[str, Any], probe: str, index: str) -> Record:
    prefix = PREFIXES[probe]
    answer = _number(log, f"{prefix}_Q_A_Prob", index, "avg_loss")
    paraphrased = _number(log, f"{prefix}_Q_A_PARA_Prob", index, "avg_loss")
    wrong = _row(log, f"{prefix}_Q_A_PERT_Prob", index).get("avg_loss", [])
    numbers = [finite(loss) for loss in (wrong if isinstance(wrong, list) else [wrong])]
    losses = Losses(
        answer,
        answer if probe in FACTS else paraphrased,
        # One that is missing would change the mean of the others.
        [n for n in numbers if n is not None] if None not in numbers else (),
    )
    metrics = losses.metrics()
    # What the file prints goes before what its losses give: it was computed in float32.
    printed = {
        "probability": _number(log, f"{prefix}_Q_A_Prob", index, "prob"),
        "probability_normalised_eps": _number(log, f"{prefix}_Q_A_Prob_normalised", index, "prob"),
        "truth_ratio_eps": _number(log, _truth_ratio(probe), index, "score"),
        **{
            ours: _number(log, f"{prefix}_Q_A_ROUGE", index, theirs)
            for theirs, ours in ROUGE.items()
        },
    }
    if probe == "forget":
        printed |= {name: _number(log, name, index, "score") for name in OF_ANSWER}
        printed |= _membership(log, "forget", index)
    return _bare(probe, index) | {
        **_texts(_row(log, f"{prefix}_Q_A_ROUGE", index)),
        "results": losses.results(),
        "metrics": metrics | {name: v for name, v in printed.items() if v is not None},
    }


def _texts(row: Mapping[str, Any]) -> Record:
    """Take the texts out of a row, if it has them."""
    if "generation" not in row:
        return {"generation": {"tokens": None, "finished": None}} if row else {}
    return {
        "question": str(row.get("input", "")),
        "answer": str(row.get("ground_truth", "")),
        "generation": {"text": str(row["generation"]), "tokens": None, "finished": None},
    }


def _bare(probe: str, index: str) -> Record:
    return {
        "probe": probe,
        "id": index,
        "question": "",
        "answer": "",
        "reference": None,
        "generation": None,
        "results": {},
    }


def _attacks(log: Mapping[str, Any]) -> list[str]:
    """Name the membership scores that a log has of both sides."""
    return [
        name
        for name, found in log.items()
        if name.startswith(MEMBERSHIP)
        and isinstance(found, dict)
        and all(found.get(side, {}).get("value_by_index") for side in ("forget", "holdout"))
    ]


def _membership(log: Mapping[str, Any], side: str, index: str) -> dict[str, float | None]:
    return {
        name: finite((log[name][side]["value_by_index"].get(index) or {}).get("score"))
        for name in _attacks(log)
    }


def _truth_ratio(probe: str) -> str:
    return TRUTH_RATIOS.get(probe, f"{PREFIXES[probe]}_Truth_Ratio")


def _by_index(log: Mapping[str, Any], name: str) -> ByIndex:
    found = log.get(name)
    rows = found.get("value_by_index") if isinstance(found, dict) else None
    return rows if isinstance(rows, dict) else {}


def _row(log: Mapping[str, Any], name: str, index: str) -> Mapping[str, Any]:
    found = _by_index(log, name).get(index)
    return found if isinstance(found, Mapping) else {}


def _number(log: Mapping[str, Any], name: str, index: str, field: str) -> float | None:
    return finite(_row(log, name, index).get(field))
