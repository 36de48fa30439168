"""`unlearn compare`: two evaluations of the same rows, score by score."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn_llm import recipe_files
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.comparison import (
    Difference,
    check_comparable,
    check_same_rows,
    compare,
)
from unlearn_llm.evaluation.records import columns_of, read_private_records, read_records
from unlearn_llm.evaluation.report import read_details
from unlearn_llm.evaluation.strict import validated
from unlearn_llm.evaluation.suite import Suite


def compare_runs(
    first: Path, second: Path, overrides: Sequence[str], reference: Path | None
) -> tuple[dict[str, Difference], list[str]]:
    """Compare two folders that `unlearn eval` wrote.

    Args:
        overrides: Of fields of the suite: objective_kind, intervals.by ...
        reference: records.jsonl of the gold model; None: the one that both runs had.

    Returns:
        The differences by score, and what a reader must know about them.

    Raises:
        UserError: the runs were not made alike.
    """
    details = [read_details(folder) for folder in (first, second)]
    check_comparable(*details)
    document = copy.deepcopy(details[0]["suite"])
    recipe_files.override(document, overrides)
    suite = validated(Suite, document, str(first))
    settled = any(text.startswith("objective_kind=") for text in overrides)
    suite, notes = _without_unlike_ovr(suite, details, settled)
    references = [one.get("reference") for one in details]
    if reference is None and references[0] == references[1] and references[0]:
        reference = Path(references[0])
    elif reference is None and any(references):
        notes.append(
            "The runs had unlike references, so nothing that needs one is compared: give "
            "--reference GOLD/records.jsonl."
        )
    one, other = read_private_records(first), read_private_records(second)
    check_same_rows(one, other)
    gold = columns_of(read_records(reference)) if reference else None
    return compare(suite, one, other, gold), notes


def _without_unlike_ovr(
    suite: Suite, details: Sequence[dict[str, Any]], settled: bool
) -> tuple[Suite, list[str]]:
    kinds = [one["suite"]["objective_kind"] for one in details]
    if settled or kinds[0] == kinds[1]:
        return suite, []
    kept = {name: score for name, score in suite.scores.items() if score.aggregate != "ovr"}
    if not kept:
        raise UserError("compare: OVR of a targeted and an untargeted loss are not comparable.")
    note = (
        f"OVR is not compared: one run's is {kinds[0]}, the other's {kinds[1]}. Give "
        "objective_kind=targeted or objective_kind=untargeted for both."
    )
    return suite.model_copy(update={"scores": kept}), [note]
