"""Aggregates: named functions from columns to a score, for suites.

An aggregate is called as `AGGREGATES[name](columns, **options)`, where
`columns[probe][metric]` is a list with one number, or None, per row, and the options are the
probe and metric names it shall read. Aggregates that compare with another model's records take
these as `reference`, in the layout of `columns`, and match rows by the column "id" of each
probe (`columns[probe]["id"]`, strings). A composite made with another metric than the published
one says so in its note, so that a proxy is seen. Sets are averaged first and then combined,
never pooled. Those of membership attacks are in attacks.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation import (
    membership_scores as membership_scores,  # registers its aggregates
)
from unlearn_llm.evaluation import scores
from unlearn_llm.evaluation.columns import (
    AGGREGATES as AGGREGATES,
)
from unlearn_llm.evaluation.columns import (
    Columns as Columns,
)
from unlearn_llm.evaluation.columns import aggregate, by_id, of_column
from unlearn_llm.evaluation.scores import Score as Score

# The metrics that the published composites are made of; any other one stands in the note.
MU9 = frozenset({"rouge", "probability", "probability_normalised", "truth_ratio"})
MU18 = MU9 | {"token_entropy", "similarity", "entailment"}
MU6 = MU18 - {"probability_normalised", "entailment"} | {"entailment_from_generation"}
UFE = MU6 - {"token_entropy"}
TFE = frozenset({"token_entropy", "refusal_entailment"})


@aggregate("mean")
def mean(columns: Columns, *, probe: str, metric: str) -> Score:
    """Arithmetic mean of one column.

    Source: `scores.mean`. Differs: no difference.
    """
    return of_column(columns, probe, metric, scores.mean)


@aggregate("maximum")
def maximum(columns: Columns, *, probe: str, metric: str) -> Score:
    """Greatest value of one column.

    Source: `scores.maximum`. Differs: not in the papers.
    """
    return of_column(columns, probe, metric, scores.maximum)


@aggregate("fraction")
def fraction(columns: Columns, *, probe: str, metric: str, at_least: float = 0.5) -> Score:
    """Share of rows of one column with at least such a value.

    Source: `scores.fraction`. Differs: not in the papers.
    """
    return of_column(columns, probe, metric, lambda v: scores.fraction(v, at_least=at_least))


@aggregate("below")
def below(columns: Columns, *, probe: str, metric: str, threshold: float) -> Score:
    """Share of rows of one column with less than the threshold; the note says which it was.

    Source: this package; "safe rate" in DualOptim+'s tables, whose judge and threshold are not
        published. Differs: unknown.
    """

    def share(values: Sequence[Any]) -> Score:
        score = scores.fraction(values, at_least=threshold)
        if score.value is None:
            return score
        note = "; ".join(filter(None, [f"{metric} below {threshold:g}", score.note]))
        return Score(1 - score.value, score.n, note)

    return of_column(columns, probe, metric, share)


@aggregate("average")
def average(columns: Columns, *, members: Sequence[Mapping[str, Any]]) -> Score:
    """Arithmetic mean of other scores, whatever their numbers of rows; `members` as in `hmean`.

    Source: "AVG" in DualOptim+'s tables of safety and downstream tasks. Differs: no difference.
    """
    named = _members(columns, members)
    if not named:
        return Score.missing("no members given")
    return scores.combine(named, lambda values: sum(values) / len(values))


@aggregate("hmean")
def hmean(columns: Columns, *, members: Sequence[Mapping[str, Any]]) -> Score:
    """Harmonic mean of other scores.

    `members` has one mapping per member: its options, and under "aggregate" its name ("mean"
    where there is none).

    Source: scipy.stats.hmean. Differs: no difference.
    """
    named = _members(columns, members)
    return scores.harmonic_mean(named) if named else Score.missing("no members given")


def _members(columns: Columns, members: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    named: dict[str, Score] = {}
    for index, member in enumerate(members):
        options = dict(member)
        name = str(options.pop("aggregate", "mean"))
        named[f"member {index + 1} ({name})"] = AGGREGATES[name](columns, **options)
    return named


@aggregate("truth_ratio_nonforget")
def truth_ratio_nonforget(
    columns: Columns, *, probe: str = "retain", metric: str = "truth_ratio"
) -> Score:
    """Mean of max(0, 1 - r).

    Source: `scores.truth_ratio_nonforget`. Differs: no difference.
    """
    return of_column(columns, probe, metric, scores.truth_ratio_nonforget)


@aggregate("truth_ratio_forget")
def truth_ratio_forget(
    columns: Columns, *, probe: str = "forget", metric: str = "truth_ratio", eps: float = 0.0
) -> Score:
    """Mean of min(r, 1/r), TOFU's and open-unlearning's forget truth ratio.

    Source: `scores.truth_ratio_forget`; open-unlearning: metric "truth_ratio_eps", eps 1e-10.
        Differs: no difference.
    """
    return of_column(columns, probe, metric, lambda v: scores.truth_ratio_forget(v, eps=eps))


@aggregate("truth_ratio_forget_ufe")
def truth_ratio_forget_ufe(
    columns: Columns, *, probe: str = "forget", metric: str = "truth_ratio"
) -> Score:
    """One minus the mean of min(r, 1/r), the forget truth ratio inside UFE.

    Source: `scores.truth_ratio_forget_ufe`. Differs: no difference.
    """
    return of_column(columns, probe, metric, scores.truth_ratio_forget_ufe)


@aggregate("truth_ratio_share")
def truth_ratio_share(
    columns: Columns, *, probe: str = "forget", metric: str = "truth_ratio"
) -> Score:
    """Mean of 1 / (1 + r).

    Source: `scores.truth_ratio_share`. Differs: as there.
    """
    return of_column(columns, probe, metric, scores.truth_ratio_share)


@aggregate("ufe")
def ufe(
    columns: Columns,
    *,
    probe: str = "forget",
    rouge: str = "rouge",
    probability: str = "probability",
    truth_ratio: str = "truth_ratio",
    similarity: str = "similarity",
    entailment: str = "entailment_from_generation",
) -> Score:
    """Untargeted forget efficacy: one minus the mean of five measures of leaking. Up is better.

    Source: DualOptim+, CityU-MLO/DualOptimPlus@b370724 get_eval_results; "Forget Efficacy" of
        closer-look@b622294. Differs: no difference.
    """
    members = {
        f"{probe}/{rouge}": mean(columns, probe=probe, metric=rouge),
        f"{probe}/{probability}": mean(columns, probe=probe, metric=probability),
        f"{probe}/{truth_ratio}": truth_ratio_forget_ufe(columns, probe=probe, metric=truth_ratio),
        f"{probe}/{similarity}": mean(columns, probe=probe, metric=similarity),
        f"{probe}/{entailment}": mean(columns, probe=probe, metric=entailment),
    }
    score = scores.combine(members, lambda leaks: 1 - sum(leaks) / len(leaks))
    return _say_unusual(score, (rouge, probability, truth_ratio, similarity, entailment), UFE)


@aggregate("tfe")
def tfe(
    columns: Columns,
    *,
    probe: str = "forget",
    token_entropy: str = "token_entropy",
    entailment: str = "refusal_entailment",
) -> Score:
    """Targeted forget efficacy: harmonic mean of token entropy and refusal entailment.

    Source: DualOptim+, CityU-MLO/DualOptimPlus@b370724 get_eval_results. Differs: no difference
        in the aggregate. It saturates near .5: no fixed refusal entails every other one.
    """
    score = scores.harmonic_mean(
        {
            f"{probe}/{token_entropy}": mean(columns, probe=probe, metric=token_entropy),
            f"{probe}/{entailment}": mean(columns, probe=probe, metric=entailment),
        }
    )
    return _say_unusual(score, (token_entropy, entailment), TFE)


@aggregate("mu6")
def mu6(
    columns: Columns,
    *,
    probe: str = "retain",
    rouge: str = "rouge",
    probability: str = "probability",
    truth_ratio: str = "truth_ratio",
    token_entropy: str = "token_entropy",
    similarity: str = "similarity",
    entailment: str = "entailment_from_generation",
) -> Score:
    """Model utility on real persons: harmonic mean of the six metrics of one set.

    With `entailment: entailment` it is the "Model Utility Retain" of TOFU runs.

    Source: DualOptim+, CityU-MLO/DualOptimPlus@b370724 get_eval_results. Differs: no difference.
    """
    means = (rouge, probability, token_entropy, similarity, entailment)
    members = _utility_members(columns, probe, means, truth_ratio)
    return _say_unusual(scores.harmonic_mean(members), (*means, truth_ratio), MU6)


@aggregate("mu9")
def mu9(
    columns: Columns,
    *,
    retain: str = "retain",
    facts: Sequence[str] = ("real_authors", "world_facts"),
    rouge: str = "rouge",
    probability: str = "probability",
    probability_normalised: str = "probability_normalised",
    truth_ratio: str = "truth_ratio",
) -> Score:
    """Model utility of TOFU: harmonic mean of ROUGE, probability and truth ratio on three sets.

    `retain` is the probe whose probability is plain, `facts` are those whose probability is
    taken against the wrong answers.

    Source: TOFU, locuslab/tofu@bdc209e aggregate_eval_stat.py. Differs: no difference; with
        `truth_ratio_arithmetic` that repository's utils.py, with the `_eps` metrics
        open-unlearning@d3d7cf9.
    """
    members = _utility_members(columns, retain, (rouge, probability), truth_ratio)
    for probe in facts:
        members |= _utility_members(columns, probe, (rouge, probability_normalised), truth_ratio)
    used = (rouge, probability, probability_normalised, truth_ratio)
    return _say_unusual(scores.harmonic_mean(members), used, MU9)


@aggregate("mu18")
def mu18(
    columns: Columns,
    *,
    retain: str = "retain",
    facts: Sequence[str] = ("real_authors", "world_facts"),
    rouge: str = "rouge",
    probability: str = "probability",
    probability_normalised: str = "probability_normalised",
    truth_ratio: str = "truth_ratio",
    token_entropy: str = "token_entropy",
    similarity: str = "similarity",
    entailment: str = "entailment",
) -> Score:
    """Model utility of closer-look and DualOptim(+): harmonic mean of six metrics on three sets.

    Source: closer-look@b622294, DualOptim@a95ef74, DualOptim+@b370724 get_eval_results. Differs:
        no difference.
    """
    texts = (rouge, token_entropy, similarity, entailment)
    members = _utility_members(columns, retain, (probability, *texts), truth_ratio)
    for probe in facts:
        means = (probability_normalised, *texts)
        members |= _utility_members(columns, probe, means, truth_ratio)
    used = (*texts, probability, probability_normalised, truth_ratio)
    return _say_unusual(scores.harmonic_mean(members), used, MU18)


@aggregate("ovr")
def ovr(
    columns: Columns,
    *,
    kind: Literal["targeted", "untargeted"],
    utility: Literal["mu18", "mu9", "mu6"] = "mu18",
    ufe_options: Mapping[str, Any] | None = None,
    tfe_options: Mapping[str, Any] | None = None,
    mu_options: Mapping[str, Any] | None = None,
) -> Score:
    """Overall: mean of forgetting and utility.

    Kind "targeted" (losses that teach a refusal) is ((UFE + TFE) / 2 + MU) / 2, "untargeted" is
    (UFE + MU) / 2, where MU is the aggregate that `utility` names.

    Source: no released code; derived from DualOptim+'s tables, 68 of 72 cells within rounding.
        Differs: unknown.
    """
    if kind not in ("targeted", "untargeted"):
        raise UserError(f"ovr: kind must be 'targeted' or 'untargeted', got {kind!r}.")
    efficacy = {"ufe": ufe(columns, **(ufe_options or {}))}
    if kind == "targeted":
        efficacy["tfe"] = tfe(columns, **(tfe_options or {}))
    members = {**efficacy, utility: AGGREGATES[utility](columns, **(mu_options or {}))}
    return scores.combine(
        members, lambda values: (sum(values[:-1]) / len(efficacy) + values[-1]) / 2
    )


@aggregate("forget_quality")
def forget_quality(
    columns: Columns,
    *,
    probe: str = "forget",
    metric: str = "truth_ratio",
    reference: Columns | None = None,
) -> Score:
    """P-value of the KS test of truth ratios against a model that never saw the forget set.

    Source: `scores.forget_quality`. Differs: as there.
    """
    return _against_reference(columns, reference, probe, metric, scores.forget_quality)


@aggregate("ks_statistic")
def ks_statistic(
    columns: Columns,
    *,
    probe: str = "forget",
    metric: str = "truth_ratio",
    reference: Columns | None = None,
) -> Score:
    """Distance D of that test.

    Source: `scores.ks_statistic`. Differs: as there.
    """
    return _against_reference(columns, reference, probe, metric, scores.ks_statistic)


def _utility_members(
    columns: Columns, probe: str, means: Sequence[str], truth_ratio: str
) -> dict[str, Score]:
    members = {f"{probe}/{metric}": mean(columns, probe=probe, metric=metric) for metric in means}
    members[f"{probe}/{truth_ratio}"] = truth_ratio_nonforget(
        columns, probe=probe, metric=truth_ratio
    )
    return members


def _against_reference(
    columns: Columns,
    reference: Columns | None,
    probe: str,
    metric: str,
    compute: Callable[[Mapping[str, Any], Mapping[str, Any]], Score],
) -> Score:
    if reference is None:
        return Score.missing("no reference records given")
    here, there = by_id(columns, probe, metric), by_id(reference, probe, metric)
    if isinstance(here, Score):
        return here
    if isinstance(there, Score):
        return Score.missing(f"in the reference: {there.note}")
    return compute(here, there)


def _say_unusual(score: Score, used: Sequence[str], published: frozenset[str]) -> Score:
    said = [f"uses {metric!r}" for metric in used if metric not in published]
    note = "; ".join([*said, *filter(None, [score.note])])
    return Score(score.value, score.n, note or None)
