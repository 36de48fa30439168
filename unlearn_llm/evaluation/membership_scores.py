"""Aggregates of membership attacks: can the forget set be told from rows that nobody trained on?

They compare the column of a membership score (membership.py) on two probes. The holdout probe
must hold rows of the same kind as the forget set, or the attack sees the kind and not the training.
"""

import numpy as np

from unlearn_llm.evaluation import roc, scores
from unlearn_llm.evaluation.columns import Columns, aggregate, by_id, column
from unlearn_llm.evaluation.scores import Score, Values

MUSE_RETRAINED = {"news": 0.4772, "books": 0.5393}
"""MUSE's forget_holdout_Min-40% of its retrained models: the chance that a forget row looks less
like a member."""


@aggregate("mia_auc")
def mia_auc(
    columns: Columns, *, metric: str, forget: str = "forget", holdout: str = "holdout"
) -> Score:
    """AUC of a membership score between two probes: 1 is "the forget set is memorised".

    Source: `scores.mia_auc`. Differs: no difference.
    """
    found = membership_scores(columns, metric, forget, holdout)
    return found if isinstance(found, Score) else scores.mia_auc(*found)


@aggregate("mia_reference_auc")
def mia_reference_auc(
    columns: Columns,
    *,
    metric: str = "mia_loss",
    forget: str = "forget",
    holdout: str = "holdout",
    reference: Columns | None = None,
) -> Score:
    """AUC of the reference attack: the score of a row less the reference model's of the same row.

    Source: locuslab/open-unlearning@d3d7cf9 mia_reference. Differs: the reference model is read
        from its records, by row id, and never loaded.
    """
    found = membership_scores(columns, metric, forget, holdout, reference, calibrated=True)
    return found if isinstance(found, Score) else scores.mia_auc(*found)


@aggregate("mia_tpr")
def mia_tpr(
    columns: Columns,
    *,
    metric: str,
    forget: str = "forget",
    holdout: str = "holdout",
    at_fpr: float = 0.01,
) -> Score:
    """Share of the forget set that the attack names where it is wrong on `at_fpr` of the holdout.

    Source: `roc.tpr_at`; arXiv:2112.03570, which argues for it. Differs: not in the papers on
        unlearning.
    """
    found = membership_scores(columns, metric, forget, holdout)
    if isinstance(found, Score):
        return found
    inside, outside = scores.measured(found[0]), scores.measured(found[1])
    if not len(inside) or not len(outside):
        return Score.missing(f"{len(inside)} forget and {len(outside)} holdout rows measured")
    return Score(roc.tpr_at(roc.roc_curve(inside, outside), at_fpr), len(inside) + len(outside))


@aggregate("privleak")
def privleak(
    columns: Columns,
    *,
    metric: str = "mia_min_k",
    forget: str = "forget",
    holdout: str = "holdout",
    reference: Columns | None = None,
    reference_auc: float | None = None,
) -> Score:
    """Leakage in percent of what a model that never saw the forget set leaks; 0 is ideal.

    Needs either that model's records as `reference`, or its AUC in the direction of `mia_auc`
    as `reference_auc` (0.5: the reference knows nothing).

    Source: `scores.privleak`. Differs: no silent default; the note says which AUC was used.
    """
    if (reference is None) == (reference_auc is None):
        return Score.missing("give either reference records or reference_auc")
    found = {"mia_auc": mia_auc(columns, metric=metric, forget=forget, holdout=holdout)}
    found["reference mia_auc"] = (
        Score(reference_auc)
        if reference is None
        else mia_auc(reference, metric=metric, forget=forget, holdout=holdout)
    )
    score = scores.combine(found, lambda aucs: scores.privleak(*aucs))
    if score.value is None:
        return score
    used = f"reference AUC {found['reference mia_auc'].value:.6g}"
    return Score(score.value, found["mia_auc"].n, "; ".join(filter(None, (used, score.note))))


@aggregate("privleak_muse")
def privleak_muse(
    columns: Columns,
    *,
    corpus: str,
    metric: str = "mia_min_k",
    forget: str = "forget",
    holdout: str = "holdout",
) -> Score:
    """Leakage in percent against the retrained model's AUC that MUSE states for its corpora.

    Source: MUSE, swj0419/muse_bench@fcd6651: 100 (AUC - AUC_retrain) / AUC_retrain. Differs: 1e-10
        in the denominator; the AUC is computed the other way round, `mia_auc` is one minus theirs.
    """
    if corpus not in MUSE_RETRAINED:
        known = ", ".join(MUSE_RETRAINED)
        return Score.missing(f"no published AUC for the corpus {corpus!r}; known: {known}")
    return privleak(
        columns,
        metric=metric,
        forget=forget,
        holdout=holdout,
        reference_auc=1 - MUSE_RETRAINED[corpus],
    )


def membership_scores(
    columns: Columns,
    metric: str,
    forget: str,
    holdout: str,
    reference: Columns | None = None,
    calibrated: bool = False,
) -> tuple[Values, Values] | Score:
    """Find the columns of the two probes, less the reference's if `calibrated`."""
    found: list[Values] = []
    for probe in (forget, holdout):
        values: Values | Score = column(columns, probe, metric)
        if calibrated and not isinstance(values, Score):
            values = _less_reference(columns, reference, probe, metric)
        if isinstance(values, Score):
            return values
        found.append(values)
    return found[0], found[1]


def _less_reference(
    columns: Columns, reference: Columns | None, probe: str, metric: str
) -> Values | Score:
    if reference is None:
        return Score.missing("no reference records given")
    here, there = by_id(columns, probe, metric), by_id(reference, probe, metric)
    if isinstance(here, Score):
        return here
    if isinstance(there, Score):
        return Score.missing(f"in the reference: {there.note}")
    if here.keys() != there.keys():
        differing = len(here.keys() ^ there.keys())
        return Score.missing(f"the reference has other rows of {probe!r}: {differing} in one only")
    ours = np.array(list(here.values()), dtype=np.float64)  # None becomes NaN: not measured
    return ours - np.array([there[row] for row in here], dtype=np.float64)
