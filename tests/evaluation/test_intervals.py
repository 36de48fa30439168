"""The intervals of a suite's scores: the same aggregates, on drawn authors."""

import numpy as np
import pytest
from scipy import stats

from unlearn_llm.evaluation.intervals import with_intervals
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.evaluation.suite_scores import calls_of, score_all

ROWS = {"forget": 60, "retain": 80, "real_authors": 40, "world_facts": 30}


def columns_for(suite, seed=0, authors=True):
    """Random columns for every metric; ten rows of the first two probes share an author."""
    rng = np.random.default_rng(seed)
    columns = {}
    for probe, of_suite in suite.probes.items():
        n = ROWS.get(probe, 60)
        shared = authors and probe in ("forget", "retain", "holdout")
        columns[probe] = {
            "id": [str(row) for row in range(n)],
            "group": [str(row // 10) if shared else None for row in range(n)],
        }
        for metric in of_suite.metrics:
            columns[probe][metric] = rng.uniform(0.1, 0.9, n).tolist()
    return columns


def intervals(suite, columns, reference=None):
    return with_intervals(suite, score_all(suite, columns, reference), columns, reference)


def test_every_score_of_the_suite_gets_an_interval_around_it():
    suite = Suite.load("tofu", intervals={"resamples": 200})
    columns, gold = columns_for(suite), columns_for(suite, seed=1)
    columns["forget"]["rouge"][7] = None
    found, about = intervals(suite, columns, gold)
    assert about["clusters"] == {"forget": 6, "retain": 8, "real_authors": 40, "world_facts": 30}
    assert about["without"] == {}
    for score in found.values():
        assert score.interval.low <= score.value <= score.interval.high
        assert score.interval.confidence == 0.95
    assert found["UFE"].interval.method == "percentile bootstrap by author"
    assert found["world_facts/rouge"].interval.method == "percentile bootstrap by row"
    assert found["forget_quality"].interval.method == "bootstrap band by author"
    assert (found, about) == intervals(suite, columns, gold)  # the same seed


def test_a_composite_is_made_of_resampled_rows_by_hand():
    suite = Suite.load("tofu", intervals={"resamples": 2000, "by": "row"})
    suite = suite.model_copy(update={"scores": {"UFE": suite.scores["UFE"]}})
    columns = columns_for(suite)
    found, _ = intervals(suite, columns)
    forget = {m: np.array(v) for m, v in columns["forget"].items() if m not in ("id", "group")}

    def efficacy(rows):
        ratio = forget["truth_ratio"][rows]
        leaks = [forget[m][rows].mean(0) for m in ("rouge", "probability", "similarity")]
        leaks.append(forget["entailment_from_generation"][rows].mean(0))
        leaks.append(1 - np.minimum(ratio, 1 / ratio).mean(0))
        return 1 - np.mean(leaks, axis=0)

    rng = np.random.default_rng(5)
    drawn = efficacy(rng.integers(60, size=(60, 2000)))
    expected = np.quantile(drawn, [0.025, 0.975])
    ends = (found["UFE"].interval.low, found["UFE"].interval.high)
    assert ends == pytest.approx(tuple(expected), abs=0.005)


def test_rows_of_one_author_make_the_interval_wider():
    suite = Suite.load("tofu", intervals={"resamples": 300})
    columns = columns_for(suite)
    alike = np.random.default_rng(2).uniform(size=6).repeat(10)
    columns["forget"]["probability"] = alike.tolist()
    by_author = intervals(suite, columns)[0]["forget/probability"].interval
    by_row = intervals(suite.model_copy(update={"intervals": settings(by="row")}), columns)[0]
    width = by_author.high - by_author.low
    row = by_row["forget/probability"].interval
    assert width > 2 * (row.high - row.low)
    standard = alike.reshape(6, 10).mean(1).std() / np.sqrt(6)
    assert width == pytest.approx(2 * stats.norm.ppf(0.975) * standard, rel=0.15)


def settings(**changed):
    return Suite.load("tofu", intervals={"resamples": 300, **changed}).intervals


def test_attacks_and_privleak_have_intervals_too():
    suite = Suite.load("privacy", intervals={"resamples": 200})
    columns, gold = columns_for(suite), columns_for(suite, seed=1)
    found, about = intervals(suite, columns, gold)
    assert about["without"] == {}
    for name, score in found.items():
        auc = name.startswith("mia")
        method = "DeLong (logit) by author" if auc else "percentile bootstrap by author"
        assert score.interval.method == method, name
        assert score.interval.low <= score.value <= score.interval.high
    without_gold, _ = intervals(suite, columns)
    assert without_gold["privleak"].value is without_gold["privleak"].interval is None


def test_two_authors_are_too_few_and_the_reason_is_said():
    suite = Suite.load("tofu", intervals={"resamples": 100})
    columns = columns_for(suite)
    columns["forget"]["group"] = ["a"] * 30 + ["b"] * 30
    found, about = intervals(suite, columns)
    assert found["UFE"].interval is None
    assert found["MU18"].interval is not None
    assert about["without"]["OVR"] == "needs 5 authors or more: forget has 2"
    assert "forget_quality" not in about["without"]  # it has no value either


def test_what_does_not_vary_has_no_interval_but_a_share_has():
    suite = Suite.load("tofu", intervals={"resamples": 100})
    columns = columns_for(suite)
    columns["forget"]["overlap"] = [0.0] * 60
    columns["forget"]["rouge"] = [0.0] * 60
    found, about = intervals(suite, columns)
    share = found["forget/verbatim"].interval
    assert (share.low, share.method) == (0.0, "Clopper-Pearson by author")
    assert share.high == pytest.approx(1 - 0.025 ** (1 / 6))  # six authors, none of them leaks
    assert found["forget/rouge"].interval is None
    assert about["without"]["forget/rouge"] == "all resamples gave the same score"


def test_without_intervals_nothing_is_drawn():
    suite = Suite.load("tofu", intervals=None)
    columns = columns_for(suite)
    assert intervals(suite, columns) == (score_all(suite, columns), {})


def test_a_reference_in_another_order_is_the_same_reference():
    suite = Suite.load("tofu", intervals={"resamples": 100})
    columns, gold = columns_for(suite), columns_for(suite, seed=1)
    turned = {p: {m: values[::-1] for m, values in of.items()} for p, of in gold.items()}
    assert intervals(suite, columns, gold) == intervals(suite, columns, turned)


def test_a_call_has_all_options_of_its_aggregate():
    calls = {call.name: call for call in calls_of(Suite.load("tofu"))}
    assert calls["forget_quality"].options == {"probe": "forget", "metric": "truth_ratio"}
    assert calls["forget_quality"].compares
    assert calls["OVR"].options["kind"] == "untargeted"
