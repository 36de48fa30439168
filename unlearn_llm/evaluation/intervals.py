"""How sure the scores of a suite are: an interval for each, over the rows it was made of."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unlearn_llm.evaluation.columns import Columns
from unlearn_llm.evaluation.resampling import GROUP, Arrays, Rows, as_arrays, clusters_of, take
from unlearn_llm.evaluation.roc import auc_interval
from unlearn_llm.evaluation.scores import Array, Interval, Score
from unlearn_llm.evaluation.statistics import (
    ks_interval,
    ks_p_value,
    percentile_interval,
    resamples,
    share_interval,
)
from unlearn_llm.evaluation.suite import Intervals, Suite
from unlearn_llm.evaluation.suite_scores import ATTACKS, Call, calls_of, sides_of

LEAST_CLUSTERS = 5
"""Fewer authors (forget01 has two) say nothing about how authors differ."""
MOST_MISSING = 0.05
"""Share of the resamples that may come without a score."""
KS = ("ks_statistic", "forget_quality")
IRREGULAR = {"maximum": "the greatest value of other rows cannot be told from these"}
"""Aggregates of which resampling says nothing."""


class Sampled:
    """The rows of a model and of the reference, and how they are resampled."""

    def __init__(self, settings: Intervals, columns: Columns, reference: Columns | None) -> None:
        self.settings = settings
        self.columns = columns
        self.arrays = as_arrays(columns)
        self.reference = None if reference is None else as_arrays(reference, columns)
        self.clusters = clusters_of(columns, settings.by == "author")
        self.counts = {probe: int(of.max(initial=-1)) + 1 for probe, of in self.clusters.items()}

    def generator(self, probe: str) -> np.random.Generator:
        """Give the random numbers of a probe, which do not change with the other probes."""
        return np.random.default_rng([self.settings.seed, zlib.crc32(probe.encode())])

    def draws(self) -> Iterator[dict[str, Rows]]:
        """Draw the rows of every probe, again and again."""
        drawn = {
            probe: resamples(numbers, self.settings.resamples, self.generator(probe))
            for probe, numbers in self.clusters.items()
        }
        for _ in range(self.settings.resamples):
            yield {probe: next(rows) for probe, rows in drawn.items()}

    def why_not(self, call: Call) -> str | None:
        """Say why a score cannot get an interval; None: it can."""
        if call.aggregate in IRREGULAR:
            return IRREGULAR[call.aggregate]
        few = [p for p in probes_of(call, self.arrays) if self.counts[p] < LEAST_CLUSTERS]
        if few:
            listed = ", ".join(f"{probe} has {self.counts[probe]}" for probe in few)
            return f"needs {LEAST_CLUSTERS} {self.by(call)}s or more: {listed}"
        return None

    def by(self, call: Call) -> str:
        """Say what is drawn for a score: "author" where rows of any of its probes share one."""
        probes = probes_of(call, self.arrays)
        shared = any(self.counts[probe] < len(self.clusters[probe]) for probe in probes)
        return "author" if shared else "row"

    def values(self, calls: Sequence[Call]) -> dict[str, Array]:
        """Make the scores of every draw: (resamples,) each, NaN where there is none."""
        found: dict[str, list[float]] = {call.name: [] for call in calls}
        for rows in self.draws() if calls else ():
            drawn = take(self.arrays, rows)
            theirs = None if self.reference is None else take(self.reference, rows)
            for call in calls:
                found[call.name].append(number(call(drawn, theirs)))
        return {name: np.array(values) for name, values in found.items()}


def with_intervals(
    suite: Suite, scores: Mapping[str, Score], columns: Columns, reference: Columns | None = None
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Give the scores their intervals.

    Resamples rows, or authors with all their rows, of every probe on its own, and makes the
    scores of each resample by the same aggregates. Attacks get DeLong's interval and the KS test
    a band (`roc.auc_interval`, `statistics.ks_interval`), which resampling would not get right.

    Args:
        scores: Those of `score_all`, of these columns and this reference.

    Returns:
        The scores; and what scores.json says about the intervals: the settings, the number of
        clusters of each probe, and why scores have none.
    """
    if suite.intervals is None:
        return dict(scores), {}
    sampled = Sampled(suite.intervals, columns, reference)
    without = {c.name: why for c in calls_of(suite) if (why := sampled.why_not(c))}
    able = [c for c in calls_of(suite) if scores[c.name].value is not None]
    able = [c for c in able if c.name not in without]
    values = sampled.values([c for c in able if c.aggregate not in (*ATTACKS, *KS)])
    found = dict(scores)
    for call in able:
        interval = _interval(call, sampled, reference, values.get(call.name), scores[call.name])
        if isinstance(interval, str):
            without[call.name] = interval
        else:
            found[call.name] = replace(scores[call.name], interval=interval)
    about = {
        **suite.intervals.model_dump(),
        "clusters": sampled.counts,
        "without": {name: why for name, why in without.items() if scores[name].value is not None},
    }
    return found, about


def _interval(
    call: Call, sampled: Sampled, reference: Columns | None, values: Array | None, score: Score
) -> Interval | str:
    """Make the interval of one score, or say why there is none."""
    settings = sampled.settings
    if values is None:
        make: Callable[..., Interval | None] = _of_attack if call.aggregate in ATTACKS else _of_ks
        return make(call, sampled, reference) or "too few rows were measured"
    known = values[~np.isnan(values)]
    if len(known) < (1 - MOST_MISSING) * len(values):
        return f"{len(values) - len(known)} of {len(values)} resamples gave no score"
    ends = percentile_interval(known, settings.confidence)
    if ends is not None:
        return Interval(*ends, settings.confidence, f"percentile bootstrap by {sampled.by(call)}")
    if call.aggregate == "fraction":
        count = sampled.counts[call.options["probe"]]
        ends = share_interval(round(number(score) * count), count, settings.confidence)
        return Interval(*ends, settings.confidence, f"Clopper-Pearson by {sampled.by(call)}")
    return "all resamples gave the same score"


def _of_attack(call: Call, sampled: Sampled, reference: Columns | None) -> Interval | None:
    sides = sides_of(call, sampled.columns, reference)
    assert sides is not None  # the score was made
    known = [~np.isnan(side) for side in sides]
    groups: list[Sequence[str | None] | None] = []
    for probe, kept in zip(("forget", "holdout"), known, strict=True):
        of_probe = sampled.columns[call.options[probe]].get(GROUP, ())
        by_author = sampled.settings.by == "author" and len(of_probe) > 0
        groups.append(list(itertools.compress(of_probe, kept)) if by_author else None)
    forget, holdout = (side[kept] for side, kept in zip(sides, known, strict=True))
    return auc_interval(forget, holdout, groups[0], groups[1], sampled.settings.confidence)


def _of_ks(call: Call, sampled: Sampled, reference: Columns | None) -> Interval | None:
    probe, metric = call.options["probe"], call.options["metric"]
    assert sampled.reference is not None and probe in sampled.reference  # the score was made
    ours, theirs = sampled.arrays[probe][metric], sampled.reference[probe][metric]
    known = ~np.isnan(ours) & ~np.isnan(theirs)
    settings = sampled.settings
    _, numbers = np.unique(sampled.clusters[probe][known], return_inverse=True)
    low, high = ks_interval(
        ours[known],
        theirs[known],
        numbers,
        settings.resamples,
        settings.confidence,
        sampled.generator(probe),
    )
    if call.aggregate == "forget_quality":
        n = int(known.sum())
        low, high = ks_p_value(high, n), ks_p_value(low, n)
    return Interval(low, high, settings.confidence, f"bootstrap band by {sampled.by(call)}")


def number(score: Score) -> float:
    """Give the value of a score, NaN for one that was not measured."""
    return float("nan") if score.value is None else score.value


def probes_of(call: Call, arrays: Arrays) -> list[str]:
    """List the probes that a score reads."""
    read: dict[str, None] = {}

    class Noted(dict[str, Any]):
        def __getitem__(self, probe: str) -> Any:
            read[probe] = None
            return super().__getitem__(probe)

    rows = {probe: np.arange(len(next(iter(of.values()), ()))) for probe, of in arrays.items()}
    columns = take(arrays, rows)
    for reference in (None, columns):  # some stop early without one, others with one
        call(Noted(columns), reference)
    return list(read)
