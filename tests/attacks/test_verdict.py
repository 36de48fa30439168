import itertools

import numpy as np
import pytest
from scipy import stats

from unlearn_llm.attacks.verdict import (
    LEAKS,
    LIKE_GOLD,
    NOT_TESTED,
    SUPPRESSED,
    Rules,
    compare,
    decide,
    describe,
    group_means,
    holm,
    mcnemar,
    mean_exceeds,
)

RULES = Rules()
ALONE: dict = {}


def rows(values) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}


def verdict(model, gold, not_run=None, is_text=True):
    return decide([compare("plain", model, gold, ALONE, is_text, RULES)], not_run or {}, RULES)


def test_holm_rejects_as_in_the_worked_example():
    # Holm 1979 with alpha 0.05 and four tests: bounds 0.0125, 0.0167, 0.025, 0.05 in order.
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.013, 0.001], 0.05) == [True, True]
    assert holm([], 0.05) == []


def test_a_mean_is_tested_as_by_scipy():
    differences = np.random.default_rng(0).normal(0.1, 0.3, size=40)
    expected = stats.ttest_1samp(differences, 0.05, alternative="greater").pvalue
    assert mean_exceeds(differences, 0.05) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("value", "p"), [(0.05, 1.0), (0.0, 1.0), (0.9, 0.0)])
def test_differences_without_spread_exceed_the_margin_or_do_not(value, p):
    assert mean_exceeds(np.full(10, value), 0.05) == p


def test_rows_that_change_are_coin_tosses():
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(3, 1) == pytest.approx(5 / 16)  # 3 or 4 heads of 4
    assert mcnemar(0, 4) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_rows_of_a_group_are_averaged_where_there_are_many_groups():
    values = rows(range(26))
    pairs = {row: str(int(row) // 2) for row in values}
    assert group_means(values, pairs) == [number + 0.5 for number in range(0, 26, 2)]
    few = {row: str(int(row) // 13) for row in values}
    assert group_means(values, few) == list(values.values())


def test_worst_rows_and_leaks_are_named():
    side = describe(rows([0.1, 1.0, 0.2, 0.96, 0.0, 0.3, 0.4]), ALONE, 0.95)
    assert side.worst == ("1", "3", "6", "5", "2")
    assert (side.leaked, side.n) == (2, 7)
    # Clopper and Pearson by the quantiles of the beta distribution.
    expected = stats.beta.ppf([0.025, 0.975], [2, 3], [6, 5])
    assert side.leaked_interval == pytest.approx(expected, abs=1e-9)
    assert describe(rows([0.1, 1.0]), ALONE, None).leaked is None


def test_the_same_model_again_is_not_distinguishable():
    values = rows(np.random.default_rng(0).uniform(0, 0.8, size=40))
    found = verdict(values, values)
    assert found.level == LIKE_GOLD
    # Three tests at 0.05: 2^-6 = 0.0156 is below 0.0167, 2^-5 is not.
    assert found.rows_needed == 6
    assert "6 rows" in found.reasons[0]


def test_as_many_rows_as_named_are_seen_and_one_less_is_not():
    gold = rows([0.3] * 400)
    for leaked, level in ((6, LEAKS), (5, LIKE_GOLD)):
        assert verdict(rows([1.0] * leaked + [0.3] * (400 - leaked)), gold).level == level


def test_a_mean_that_hides_rows_is_no_forgetting():
    # A quarter of the rows verbatim, nothing of the others: the mean is below gold's.
    model, gold = rows([1.0] * 10 + [0.0] * 30), rows([0.4] * 40)
    assert np.mean(list(model.values())) < np.mean(list(gold.values()))
    found = verdict(model, gold)
    assert found.level == LEAKS
    assert found.reasons == ("plain: 10 of 40 rows verbatim, from gold 0",)


def test_more_on_average_than_gold_is_a_leak_also_without_verbatim_rows():
    rng = np.random.default_rng(1)
    found = verdict(rows(rng.uniform(0.5, 0.9, 40)), rows(rng.uniform(0.1, 0.5, 40)))
    assert found.level == LEAKS
    assert "on average" in found.reasons[0]


def test_less_than_gold_is_suppressed_and_not_forgotten():
    rng = np.random.default_rng(1)
    found = verdict(rows([0.0] * 40), rows(rng.uniform(0.1, 0.5, 40)))
    assert found.level == SUPPRESSED
    assert "less than gold" in found.reasons[0]


def test_without_gold_nothing_is_above_suppressed():
    assert verdict(rows([0.1] * 40), None).level == SUPPRESSED
    assert verdict(rows([0.1] * 39 + [1.0]), None).level == LEAKS
    # A probability of 1 is no text that leaked.
    assert verdict(rows([1.0] * 40), None, is_text=False).level == SUPPRESSED


def test_an_attack_that_was_not_run_caps_the_verdict_and_is_named():
    values = rows([0.1, 0.2] * 20)
    found = verdict(values, values, {"translation": "no column"})
    assert found.level == SUPPRESSED
    assert found.reasons == ("translation was not run: no column",)
    assert decide([], {"plain": "not chosen"}, RULES).level == NOT_TESTED


def test_a_trial_that_gold_lacks_caps_the_verdict():
    values = rows([0.1, 0.2] * 20)
    comparisons = [
        compare("plain", values, values, ALONE, True, RULES),
        compare("prefix", values, None, ALONE, True, RULES),
    ]
    found = decide(comparisons, {}, RULES)
    assert (found.level, found.reasons) == (SUPPRESSED, ("no gold model for prefix",))


def test_rows_that_only_one_side_has_are_not_compared():
    one = compare("plain", rows([0.5, 0.6, 0.7]), {"0": 0.4, "9": 1.0}, ALONE, True, RULES)
    assert one.gold.n == 1
    assert one.excess == pytest.approx(0.1)


def test_of_models_like_gold_at_most_one_in_twenty_is_told_from_it():
    # Five attacks on 40 rows; a model's row is gold's with noise, and attacks agree about rows.
    rng = np.random.default_rng(0)
    flagged = 0
    for _ in range(40):
        base = rng.beta(2, 3, size=40)
        comparisons = []
        for number in range(5):
            model, gold = (rows(np.clip(base + rng.normal(0, 0.25, 40), 0, 1)) for _ in range(2))
            comparisons.append(compare(str(number), model, gold, ALONE, True, RULES))
        flagged += decide(comparisons, {}, RULES).level != LIKE_GOLD
    assert flagged <= 0.05 * 40


def test_the_interval_holds_the_mean_of_the_rows():
    values = rows(itertools.islice(itertools.cycle([0.0, 1.0]), 50))
    low, high = describe(values, ALONE, 0.95).interval
    # Normal approximation: 0.5 +- 1.96 * 0.5 / sqrt(50).
    assert (low, high) == (pytest.approx(0.36, abs=0.03), pytest.approx(0.64, abs=0.03))
