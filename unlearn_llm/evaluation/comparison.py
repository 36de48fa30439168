"""Two runs on the same rows: is the difference of a score more than chance?

What is answered is whether these two *models* differ on rows like these. Whether two *methods*
do, only several seeds of each can tell.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.columns import Columns
from unlearn_llm.evaluation.intervals import KS, Sampled, number
from unlearn_llm.evaluation.records import Record, ask_the_same, columns_of
from unlearn_llm.evaluation.resampling import Arrays, as_arrays, take
from unlearn_llm.evaluation.scores import Array, Interval, Score
from unlearn_llm.evaluation.statistics import (
    percentile_interval,
    permutation_p_value,
    wilcoxon_p_value,
)
from unlearn_llm.evaluation.suite import Intervals, Suite
from unlearn_llm.evaluation.suite_scores import Call, calls_of

# Fields of a suite that may differ between comparable evaluations, or that are looked at more
# closely: where data and models lie, what is made of the same rows, how sure one wants to be.
FREE = {"folder", "reference", "objective_kind", "intervals", "scores", "judges", "probes"}
OF_MODEL = {"type": "architecture", "template": "template", "max_length": "max_length"}


@dataclass(frozen=True)
class Difference:
    """One score of two runs.

    Attributes:
        first, second: The scores; their values are None where they were not measured.
        difference: Second less first.
        interval: Of the difference, by a paired bootstrap.
        p_value: Of a permutation test: the two runs' answers to an author's questions (a row)
            are swapped at random.
        wilcoxon: P-value of Wilcoxon's signed-rank test, for means of one metric.
        note: Why something is missing.
    """

    first: Score
    second: Score
    difference: float | None = None
    interval: Interval | None = None
    p_value: float | None = None
    wilcoxon: float | None = None
    note: str | None = None


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Refuse evaluations that were not made alike, by what their scores.json say.

    Raises:
        UserError: naming all that differs.
    """
    differing = [
        f"{field} ({_short(one)} and {_short(other)})"
        for field, one, other in _settings(first, second)
        if one != other
    ]
    if differing:
        raise UserError(
            f"The two runs are not comparable; they differ in {'; '.join(differing)}. Evaluate "
            "both in the same way."
        )


def check_same_rows(first: Sequence[Record], second: Sequence[Record]) -> None:
    """Refuse records of other rows.

    Raises:
        UserError: saying how many rows of which probe differ.
    """
    rows = [{(r["probe"], r["id"]): r for r in records} for records in (first, second)]
    for probe in dict.fromkeys(probe for probe, _ in (*rows[0], *rows[1])):
        ids = [{key for key in of if key[0] == probe} for of in rows]
        if ids[0] != ids[1]:
            raise UserError(
                f"Probe {probe!r} has other rows in the two runs ({len(ids[0])} and {len(ids[1])}, "
                f"{len(ids[0] & ids[1])} in both). Nothing is compared: forget quality, above "
                "all, means nothing across numbers of rows. Evaluate both with the same limit."
            )
        unlike = sum(not ask_the_same(rows[0][key], rows[1][key]) for key in ids[0])
        if unlike:
            raise UserError(f"{unlike} rows of probe {probe!r} ask another thing in the two runs.")


def compare(
    suite: Suite,
    first: Sequence[Record],
    second: Sequence[Record],
    reference: Columns | None = None,
) -> dict[str, Difference]:
    """Compare the scores of two runs, by name.

    Args:
        suite: With the probes and scores; its `intervals` say how much is drawn.
        first, second: Records of the same rows; see `check_same_rows`.
        reference: Columns of the records of a model that never saw the forget set.
    """
    columns = columns_of(first)
    sampled = Sampled(suite.intervals or Intervals(), columns, reference)
    other = as_arrays(columns_of(second), columns)
    calls = calls_of(suite)
    whole = {probe: np.arange(len(numbers)) for probe, numbers in sampled.clusters.items()}
    theirs = None if sampled.reference is None else take(sampled.reference, whole)
    pairs = {
        call.name: (call(take(sampled.arrays, whole), theirs), call(take(other, whole), theirs))
        for call in calls
    }
    why_not = {call.name: _why_not(call, sampled, *pairs[call.name]) for call in calls}
    able = [call for call in calls if why_not[call.name] is None]
    regular = [call for call in able if call.aggregate not in KS]
    drawn = _differences(regular, sampled, _resampled(sampled, other))
    swapped = _differences(able, sampled, _swapped(sampled, other))
    found = {}
    for call in calls:
        one, two = pairs[call.name]
        if call not in able:
            found[call.name] = Difference(one, two, note=why_not[call.name])
            continue
        gap = number(two) - number(one)
        found[call.name] = Difference(
            one,
            two,
            gap,
            _interval(call, drawn.get(call.name), sampled),
            _p_value(gap, swapped[call.name]),
            _wilcoxon(call, sampled, other),
        )
    return found


def _settings(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what has to be equal: name, value of the first run, value of the second."""
    suites = [Suite.model_validate(details["suite"]).model_dump() for details in (first, second)]
    for field in suites[0]:
        if field not in FREE:
            yield field, suites[0][field], suites[1][field]
    for name, one in suites[0]["probes"].items():
        other = suites[1]["probes"].get(name, {})
        for field in ("source", "columns"):
            yield f"probes.{name}.{field}", one[field], other.get(field)
    models = [details.get("model", {}) for details in (first, second)]
    for key, name in OF_MODEL.items():
        yield name, models[0].get(key), models[1].get(key)
    yield "judges", first.get("judges"), second.get("judges")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _why_not(call: Call, sampled: Sampled, one: Score, two: Score) -> str | None:
    for score in (one, two):
        if score.value is None:
            return score.note
    if call.aggregate == "forget_quality":
        return "a p-value: its distance, ks_statistic, is compared"
    return sampled.why_not(call)


def _resampled(sampled: Sampled, other: Arrays) -> Iterator[tuple[Columns, Columns, Columns]]:
    """Yield both runs and the reference on the same drawn rows."""
    for rows in sampled.draws():
        reference = take(sampled.reference or {}, rows)
        yield take(sampled.arrays, rows), take(other, rows), reference


def _swapped(sampled: Sampled, other: Arrays) -> Iterator[tuple[Columns, Columns, Columns]]:
    """Yield the runs with the rows of half the clusters in the other's place; same reference."""
    whole = {probe: np.arange(len(numbers)) for probe, numbers in sampled.clusters.items()}
    reference = take(sampled.reference or {}, whole)
    generators = {probe: sampled.generator(f"swap/{probe}") for probe in whole}
    for _ in range(sampled.settings.resamples):
        left: Arrays = {}
        right: Arrays = {}
        for probe, numbers in sampled.clusters.items():
            coins = generators[probe].integers(2, size=sampled.counts[probe]).astype(bool)
            swap = coins[numbers]
            left[probe], right[probe] = {}, {}
            for metric in sampled.arrays[probe].keys() & other[probe].keys():
                mine, yours = sampled.arrays[probe][metric], other[probe][metric]
                left[probe][metric] = np.where(swap, yours, mine)
                right[probe][metric] = np.where(swap, mine, yours)
        yield take(left, whole), take(right, whole), reference


def _differences(
    calls: Sequence[Call], sampled: Sampled, pairs: Iterator[tuple[Columns, Columns, Columns]]
) -> dict[str, Array]:
    found: dict[str, list[float]] = {call.name: [] for call in calls}
    for one, two, reference in pairs if calls else ():
        theirs = None if sampled.reference is None else reference
        for call in calls:
            found[call.name].append(number(call(two, theirs)) - number(call(one, theirs)))
    return {name: np.array(values) for name, values in found.items()}


def _interval(call: Call, drawn: Array | None, sampled: Sampled) -> Interval | None:
    if drawn is None or np.isnan(drawn).any():
        return None
    ends = percentile_interval(drawn, sampled.settings.confidence)
    method = f"paired bootstrap by {sampled.by(call)}"
    return None if ends is None else Interval(*ends, sampled.settings.confidence, method)


def _p_value(gap: float, swapped: Array) -> float | None:
    # A permutation without a score would count as one without a difference.
    return None if np.isnan(swapped).any() else permutation_p_value(gap, swapped)


def _wilcoxon(call: Call, sampled: Sampled, other: Arrays) -> float | None:
    if call.aggregate != "mean":
        return None
    probe, metric = call.options["probe"], call.options["metric"]
    differences = other[probe][metric] - sampled.arrays[probe][metric]
    return wilcoxon_p_value(differences, sampled.clusters[probe])
