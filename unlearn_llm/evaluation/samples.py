"""From the rows of a probe's data to the samples that metrics see."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unlearn_llm.dataset import read_refusals, refusal_of
from unlearn_llm.errors import RecipeError, UserError
from unlearn_llm.evaluation.requests import Sample
from unlearn_llm.evaluation.suite import Columns, Probe, Suite
from unlearn_llm.registry import did_you_mean
from unlearn_llm.rows import column_names, load_rows, to_pairs

SPLIT = "{split}"
# The forget splits are nested and were handed out in parts: closer-look's files have the last
# 1 % of `full` first, then the 4 % before it, then the 5 % before that.
CLOSER_LOOK_PERCENT = (1, 5, 10)
OPTIONAL = ("reference", "similar_to", "group")
"""Parts of a sample whose columns the data may lack."""


class Samples(NamedTuple):
    """The samples of one probe, and what a reader of its numbers must know."""

    samples: list[Sample]
    notes: list[str]


def samples_of(suite: Suite, name: str) -> Samples:
    """Read the samples of a probe.

    Raises:
        UserError: the data is missing, lacks a column, or holds something else than text in it.
    """
    probe = suite.probes[name]
    source = suite.source_of(name)
    where = f"probe {name!r} ({source})"
    numbered = list(enumerate(load_rows(source, folder=suite.folder, seed=suite.data_seed)))
    numbered = _filtered(numbered, probe, where)
    if suite.row_order == "closer_look" and SPLIT in (probe.source or ""):
        numbered = closer_look_order(numbered, suite.split)
    limit = suite.limit if probe.limit is None else probe.limit
    kept = numbered if limit == "all" else numbered[:limit]
    notes = [] if len(kept) == len(numbered) else [f"first {len(kept)} of {len(numbered)} rows"]
    columns, absent = _present(probe.columns, kept[0][1], where)
    notes += [f"no column {column!r}: compared with the answer" for column in absent]
    refusals = read_refusals(suite.refusals)
    examples = _examples(suite, probe)
    samples = [
        _sample(
            number, row, columns, where, refusal_of(number, refusals, suite.seed), probe, examples
        )
        for number, row in kept
    ]
    return Samples(samples, notes)


def _filtered(
    rows: list[tuple[int, dict[str, Any]]], probe: Probe, where: str
) -> list[tuple[int, dict[str, Any]]]:
    """Keep the rows that the probe asks for; each keeps its number."""
    for column, text in probe.where.items():
        found = {str(row.get(column)) for _, row in rows}
        if text not in found:
            raise UserError(
                f"{where}: no row has {text!r} in column {column!r}, which has {len(found)} other "
                "values."
            )
        rows = [(number, row) for number, row in rows if str(row.get(column)) == text]
    return rows


def _examples(suite: Suite, probe: Probe) -> str:
    """Write the examples that stand before every prompt of a probe."""
    if probe.examples is None:
        return ""
    source = suite.filled(probe.examples.source)
    pairs = to_pairs(load_rows(source, folder=suite.folder, seed=suite.data_seed), source)
    return "".join(
        # Not str.format: a question may hold braces.
        probe.examples.text.replace("{answer}", pair.answer).replace("{question}", pair.question)
        for pair in pairs
    )


def closer_look_order(rows: Sequence[Any], split: str) -> list[Any]:
    """Order the rows of a forget split as the files of closer-look have them.

    Source: sail-sg/closer-look-LLM-unlearning@b622294 data/tofu, task_id 1; also DualOptim and
        DualOptim+. Differs: no difference (tests compare with their files).
    """
    found = re.search(r"\d+", split)
    percent = int(found[0]) if found else 0
    if percent not in CLOSER_LOOK_PERCENT:
        raise RecipeError(
            f"row_order: closer_look is known for forget01, forget05 and forget10, not {split!r}."
        )
    ordered: list[Any] = []
    done = 0
    for bound in CLOSER_LOOK_PERCENT[: CLOSER_LOOK_PERCENT.index(percent) + 1]:
        stop = len(rows) - len(rows) * done // percent
        ordered += rows[len(rows) - len(rows) * bound // percent : stop]
        done = bound
    return ordered


def _present(
    columns: Columns, row: Mapping[str, Any], where: str
) -> tuple[dict[str, str], list[str]]:
    """Give the columns that the data has, by the part they play, and the absent optional ones."""
    named = {part: column for part, column in columns.model_dump().items() if column}
    absent = [part for part, column in named.items() if column not in row]
    for part in absent:
        if part not in OPTIONAL:
            names = column_names(row)
            near = did_you_mean(named[part], names.split(", "))
            raise UserError(f"{where}: no column {named[part]!r} ({part}).{near} It has {names}.")
    return (
        {part: column for part, column in named.items() if part not in absent},
        [named[part] for part in absent if part != "group"],
    )


def _sample(
    number: int,
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    where: str,
    refusal: str,
    probe: Probe,
    examples: str,
) -> Sample:
    values: dict[str, Any] = {part: row.get(column) for part, column in columns.items()}
    perturbed = values.pop("perturbed", None) or ()
    perturbed = (perturbed,) if isinstance(perturbed, str) else tuple(perturbed)
    for part, value in [*values.items(), *(("perturbed", wrong) for wrong in perturbed)]:
        if not isinstance(value, str):
            raise UserError(
                f"{where}, row {number}: column {columns[part]!r} should hold text, got "
                f"{type(value).__name__}."
            )
    values.setdefault("answer", "")
    values.setdefault("paraphrased", values["answer"])
    asked = probe.prompt.replace("{question}", values.pop("question", ""))
    if "group" not in values and probe.rows_per_author is not None:
        values["group"] = str(number // probe.rows_per_author)
    values["group"] = values.get("group") or None  # generated facts have "": nobody's
    return Sample(
        id=str(number),
        question=examples + asked,
        perturbed=perturbed,
        refusal=refusal,
        max_new_tokens=probe.max_new_tokens,
        stop=probe.stop,
        **values,
    )
