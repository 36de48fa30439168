"""From the columns of a suite to its scores: which aggregate is called with what."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlearn_llm.evaluation.aggregates import AGGREGATES, Score
from unlearn_llm.evaluation.columns import Columns
from unlearn_llm.evaluation.judges import DEFAULT_SOURCES
from unlearn_llm.evaluation.membership_scores import membership_scores
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.options import metrics_of
from unlearn_llm.evaluation.roc import roc_curve
from unlearn_llm.evaluation.scores import Array, measured
from unlearn_llm.evaluation.suite import Suite

REFERENCE = "reference"
ATTACKS = {"mia_auc": False, "mia_reference_auc": True}
"""Aggregates that are the area under a curve; do they subtract the reference?"""


class Call(NamedTuple):
    """One score of a suite, ready to be made of any columns."""

    name: str
    """As in scores.json: with the judges that are not the papers'."""
    aggregate: str
    options: dict[str, Any]
    """All of them, also those that the suite does not give; but for the reference."""
    compares: bool
    """Does it compare with a reference?"""
    metrics: set[str]
    """The metrics that it reads."""

    def __call__(self, columns: Columns, reference: Columns | None = None) -> Score:
        """Make the score."""
        more = {REFERENCE: reference} if self.compares else {}
        return AGGREGATES[self.aggregate](columns, **self.options, **more)


def calls_of(suite: Suite) -> list[Call]:
    """List the scores of a suite, in its order."""
    calls = []
    for name, of_suite in suite.scores.items():
        given = suite.options_of(of_suite)
        used = metrics_of(of_suite.aggregate, given)
        parameters = inspect.signature(AGGREGATES[of_suite.aggregate]).parameters.values()
        options = {
            p.name: given.get(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY
        }
        compares = REFERENCE in options
        options.pop(REFERENCE, None)
        full_name = name + _other_judges(suite, used)
        calls.append(Call(full_name, of_suite.aggregate, options, compares, used))
    return calls


def score_all(
    suite: Suite,
    columns: Columns,
    reference: Columns | None = None,
    not_measured: Mapping[str, str] | None = None,
) -> dict[str, Score]:
    """Make every score of a suite from columns of metric values."""
    scores = {}
    for call in calls_of(suite):
        score = call(columns, reference)
        reasons = {why for metric, why in (not_measured or {}).items() if metric in call.metrics}
        if score.value is None and reasons:
            score = Score.missing("; ".join([*sorted(reasons), *filter(None, [score.note])]))
        scores[call.name] = score
    return scores


def curves_of(
    suite: Suite, columns: Columns, reference: Columns | None = None
) -> dict[str, dict[str, list[float]]]:
    """Give the ROC curve of every attack of a suite, by the name of its AUC: fpr and tpr."""
    curves = {}
    for call in calls_of(suite):
        if call.aggregate not in ATTACKS:
            continue
        sides = sides_of(call, columns, reference)
        if sides is not None:
            curve = roc_curve(*(measured(side) for side in sides))
            curves[call.name] = {"fpr": curve.fpr.tolist(), "tpr": curve.tpr.tolist()}
    return curves


def sides_of(call: Call, columns: Columns, reference: Columns | None) -> tuple[Array, Array] | None:
    """Give the scores of the forget and holdout rows of an attack, NaN where not measured.

    None where there is no attack: a probe, a metric, the reference or all rows of a side lack.
    """
    names = (call.options["forget"], call.options["holdout"])
    calibrated = ATTACKS[call.aggregate]
    found = membership_scores(columns, call.options["metric"], *names, reference, calibrated)
    if isinstance(found, Score):
        return None
    forget, holdout = (np.array(side, dtype=np.float64) for side in found)
    lacks = np.isnan(forget).all() or np.isnan(holdout).all()
    return None if lacks else (forget, holdout)


def _other_judges(suite: Suite, metrics: set[str]) -> str:
    """Name the judges in a score's name that are not the papers'."""
    kinds = {METRICS[metric].judge for metric in metrics} - {None}
    others = {
        source
        for kind, source in suite.judges.items()
        if kind in kinds and source and source != DEFAULT_SOURCES.get(kind)
    }
    return f" [{', '.join(sorted(Path(source).name for source in others))}]" if others else ""
