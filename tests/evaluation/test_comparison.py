"""Two runs on the same rows: what is refused, what is found, how often chance is taken for it."""

import numpy as np
import pytest
from test_intervals import columns_for

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.comparison import check_comparable, check_same_rows, compare
from unlearn_llm.evaluation.records import columns_of
from unlearn_llm.evaluation.suite import Suite, as_plain

NAMES = {"id", "group"}


def records_of(columns):
    return [
        {
            "probe": probe,
            "id": of["id"][row],
            "group": of["group"][row],
            "question": f"Question {row}?",
            "answer": "Yes.",
            "metrics": {metric: of[metric][row] for metric in of.keys() - NAMES},
        }
        for probe, of in columns.items()
        for row in range(len(of["id"]))
    ]


def small(*scores, **intervals):
    """The suite with one probe and these scores."""
    suite = Suite.load("tofu", intervals={"resamples": 199, **intervals})
    probe = suite.probes["forget"].model_copy(update={"metrics": ["probability", "truth_ratio"]})
    kept = {name: suite.scores[name] for name in scores}
    return suite.model_copy(update={"probes": {"forget": probe}, "scores": kept})


def retrained(rng, rows, authors=15, of_author=0.1):
    """A model that never saw the rows: they are as hard for all, but each run has its own luck."""
    per_author = rng.normal(0, of_author, authors).repeat(len(rows) // authors)
    values = rows + per_author + rng.normal(0, 0.1, len(rows))
    n = range(len(rows))
    return {
        "forget": {
            "id": [str(row) for row in n],
            "group": [str(row // (len(rows) // authors)) for row in n],
            "probability": values.tolist(),
            "truth_ratio": np.exp(values).tolist(),
        }
    }


def flagged(by, runs):
    """How many of so many pairs of retrained models differ by p < 0.05."""
    rng = np.random.default_rng(7)
    hard = rng.normal(0.5, 0.2, 150)
    suite, count = small("forget/probability", by=by), 0
    for _ in range(runs):
        one, other = records_of(retrained(rng, hard)), records_of(retrained(rng, hard))
        found = compare(suite, one, other)
        count += found["forget/probability"].p_value < 0.05
    return count


def test_of_twenty_retrained_models_at_most_one_is_flagged():
    assert flagged("author", 20) <= 1


def test_counting_rows_of_one_author_as_many_would_flag_them():
    assert flagged("row", 20) >= 4


def test_a_model_that_differs_is_found():
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.2, 150)
    first, second, gold = (retrained(rng, shifted) for shifted in (hard, hard + 0.3, hard))
    suite = small("forget/probability", "ks_statistic")
    found = compare(suite, records_of(first), records_of(second), gold)
    mean = found["forget/probability"]
    assert mean.difference == pytest.approx(0.3, abs=0.1)
    assert mean.p_value == 1 / 200  # the least that 199 permutations can give
    assert mean.interval.low < mean.difference < mean.interval.high
    assert mean.interval.low > 0
    assert mean.wilcoxon < 0.001
    distance = found["ks_statistic"]
    assert distance.difference > 0.2
    assert distance.p_value < 0.05
    assert distance.interval is None


def test_a_run_does_not_differ_from_itself():
    suite = Suite.load("tofu", intervals={"resamples": 100})
    columns, gold = columns_for(suite), columns_for(suite, seed=1)
    turned = {p: {m: values[::-1] for m, values in of.items()} for p, of in columns.items()}
    found = compare(suite, records_of(columns), records_of(turned), gold)
    quality = found.pop("forget_quality")
    assert quality.first == quality.second
    assert "ks_statistic" in quality.note
    for name, each in found.items():
        assert (each.difference, each.p_value) == (pytest.approx(0, abs=1e-15), 1.0), name
        assert each.wilcoxon in (None, 1.0)


def test_what_was_not_measured_in_one_run_is_not_compared():
    suite = Suite.load("tofu", intervals={"resamples": 100})
    columns, lacking = columns_for(suite), columns_for(suite, seed=1)
    lacking["forget"]["rouge"] = [None] * 60
    found = compare(suite, records_of(columns), records_of(lacking))
    assert found["UFE"].difference is None
    assert "not measured" not in str(found["MU18"].note)
    assert found["MU18"].p_value is not None
    assert "0 of 60 rows measured" in found["forget/rouge"].note
    assert found["ks_statistic"].note == "no reference records given"


def test_other_rows_are_refused():
    records = records_of(columns_for(Suite.load("tofu")))
    check_same_rows(records, records[::-1])
    with pytest.raises(UserError, match=r"60 and 59, 59 in both.*forget quality, above all"):
        check_same_rows(records, records[1:])
    other = [{**records[0], "question": "Which?"}, *records[1:]]
    with pytest.raises(UserError, match="1 rows of probe 'forget' ask another thing"):
        check_same_rows(records, other)


@pytest.mark.parametrize(
    ("changed", "of_model", "named"),
    [
        ({"split": "forget05"}, {}, r"split \(forget10 and forget05\)"),
        ({"limit": "all"}, {}, r"limit \(300 and all\)"),
        ({"max_new_tokens": 50}, {}, r"max_new_tokens \(200 and 50\)"),
        ({"proxies": True}, {}, r"proxies \(False and True\)"),
        ({}, {"template": "llama2"}, r"template \(plain and llama2\)"),
        ({}, {"type": "phi"}, r"architecture \(llama and phi\)"),
    ],
)
def test_runs_that_were_not_made_alike_are_refused(changed, of_model, named):
    model = {"type": "llama", "template": "plain", "max_length": 512}
    first = {"suite": as_plain(Suite.load("tofu")), "model": model}
    second = {"suite": as_plain(Suite.load("tofu", **changed)), "model": {**model, **of_model}}
    with pytest.raises(UserError, match=named):
        check_comparable(first, second)


def test_what_changes_no_answer_may_differ():
    model = {"type": "llama", "template": "plain", "max_length": 512, "name": "a"}
    first = {"suite": as_plain(Suite.load("tofu", folder="here")), "model": model}
    changed = {"folder": "there", "reference": "gold", "intervals": None}
    second = {"suite": as_plain(Suite.load("tofu", **changed)), "model": {**model, "name": "b"}}
    check_comparable(first, second)


def test_records_keep_their_authors():
    columns = columns_for(Suite.load("tofu"))
    assert columns_of(records_of(columns)) == columns
