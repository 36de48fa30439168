"""One row for TOFU's leaderboard, in its columns.

Source: locuslab/tofu@bdc209e aggregate_eval_stat.py (the numbers); the columns and their order are
    those of the Space locuslab/tofu_leaderboard. Differs: a score that was not measured is
    refused. Epoch stays empty: an alternating run has none that compares.
"""

import csv
import io
from collections.abc import Sequence

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.aggregates import AGGREGATES, Columns
from unlearn_llm.evaluation.records import Record, columns_of
from unlearn_llm.evaluation.scores import Score
from unlearn_llm.safe_text import no_formula

SETS = {
    "Real Authors": "real_authors",
    "Real World": "world_facts",
    "Retain": "retain",
    "Forget": "forget",
}
COLUMNS = (
    "Method",
    "Submitted By",
    "Epoch",
    "Model Utility",
    "Forget Quality",
    *(f"{metric} {name}" for name in SETS for metric in ("ROUGE", "Truth Ratio", "Prob.")),
)


def tofu_csv(
    records: Sequence[Record],
    reference: Sequence[Record] | None,
    *,
    method: str,
    submitted_by: str = "",
) -> str:
    """Write the header and one row.

    Args:
        records: Of the suite tofu.
        reference: Of the retain model, for forget quality.

    Raises:
        UserError: a score cannot be made of these records.
    """
    columns = columns_of(records)
    compared = None if reference is None else columns_of(reference)
    scores = {
        "Model Utility": AGGREGATES["mu9"](columns),
        "Forget Quality": AGGREGATES["forget_quality"](columns, reference=compared),
    }
    for name, probe in SETS.items():
        scores |= _of_set(columns, name, probe)
    for name, score in scores.items():
        if score.value is None:
            raise UserError(f"TOFU's leaderboard needs {name}: not measured, {score.note}.")
    said = {"Method": method, "Submitted By": submitted_by, "Epoch": ""}
    row = {name: no_formula(text) for name, text in said.items()}
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row | {name: score.value for name, score in scores.items()})
    return file.getvalue()


def _of_set(columns: Columns, name: str, probe: str) -> dict[str, Score]:
    facts = probe in ("real_authors", "world_facts")
    metric = "probability_normalised" if facts else "probability"
    form = "truth_ratio_forget" if probe == "forget" else "truth_ratio_nonforget"
    return {
        f"ROUGE {name}": AGGREGATES["mean"](columns, probe=probe, metric="rouge"),
        f"Truth Ratio {name}": AGGREGATES[form](columns, probe=probe),
        f"Prob. {name}": AGGREGATES["mean"](columns, probe=probe, metric=metric),
    }
