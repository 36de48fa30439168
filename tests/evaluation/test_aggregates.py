from typing import Any

import pytest

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.aggregates import AGGREGATES, Score

FORGET = {
    "rouge": [0.2, 0.4],
    "probability": [0.1, 0.3],
    "truth_ratio": [0.5, 2.0],  # min(r, 1/r) is .5 twice
    "similarity": [0.6, 0.4],
    "entailment_from_generation": [1.0, 0.0],
    "entailment_from_generation_proxy": [0.0, 0.0],
    "token_entropy": [0.8, 0.8],
    "refusal_entailment": [1.0, 0.0],
    "id": ["0", "1"],
}
UTILITY = {
    "rouge": [0.5],
    "probability": [0.5],
    "probability_normalised": [0.5],
    "truth_ratio": [0.5],
    "token_entropy": [0.5],
    "similarity": [0.5],
    "entailment": [0.5],
    "entailment_from_generation": [0.5],
}
COLUMNS: dict[str, dict[str, list[Any]]] = {
    "forget": FORGET,
    "retain": UTILITY,
    "real_authors": UTILITY,
    "world_facts": UTILITY,
}
# 1 - mean(.3, .2, 1 - .5, .5, .5) = .6; hmean(.8, .5) = 8/13.
UFE, TFE, MU = 0.6, 8 / 13, 0.5


def without(probe: str, metric: str) -> dict[str, Any]:
    rest = {name: column for name, column in COLUMNS[probe].items() if name != metric}
    return {**COLUMNS, probe: rest}


@pytest.mark.parametrize("name", list(AGGREGATES))
def test_aggregates_cite_their_source(name: str) -> None:
    doc = AGGREGATES[name].__doc__ or ""
    assert "Source:" in doc and "Differs:" in doc


@pytest.mark.parametrize("name", ["mean", "maximum", "fraction"])
def test_an_absent_column_says_what_is_absent(name: str) -> None:
    score = AGGREGATES[name](COLUMNS, probe="elsewhere", metric="rouge")
    assert score == Score.missing("probe 'elsewhere' was not run")
    score = AGGREGATES[name](COLUMNS, probe="forget", metric="gibberish")
    assert score == Score.missing("metric 'gibberish' was not taken on probe 'forget'")


def test_ufe_and_tfe_by_hand() -> None:
    assert AGGREGATES["ufe"](COLUMNS).value == pytest.approx(UFE)
    assert AGGREGATES["tfe"](COLUMNS).value == pytest.approx(TFE)


@pytest.mark.parametrize("name", ["mu6", "mu9", "mu18"])
def test_utility_of_halves_is_a_half(name: str) -> None:
    assert AGGREGATES[name](COLUMNS) == Score(pytest.approx(MU), None, None)


def test_utility_averages_sets_before_it_combines_them() -> None:
    # hmean of 8 halves and one quarter: 9 / (8 * 2 + 4), whatever the number of rows.
    columns = {**COLUMNS, "retain": {**UTILITY, "rouge": [0.0, 0.5, 0.25]}}
    assert AGGREGATES["mu9"](columns).value == pytest.approx(9 / 20)


def test_utility_of_one_set_can_be_another_set() -> None:
    assert AGGREGATES["mu6"](COLUMNS, probe="world_facts").value == pytest.approx(MU)
    assert AGGREGATES["mu9"](COLUMNS, facts=["world_facts"]).value == pytest.approx(MU)


def test_overall_by_kind() -> None:
    targeted = AGGREGATES["ovr"](COLUMNS, kind="targeted")
    assert targeted.value == pytest.approx(((UFE + TFE) / 2 + MU) / 2)
    untargeted = AGGREGATES["ovr"](COLUMNS, kind="untargeted", utility="mu6")
    assert untargeted.value == pytest.approx((UFE + MU) / 2)
    with pytest.raises(UserError, match="'targeted' or 'untargeted', got 'both'"):
        AGGREGATES["ovr"](COLUMNS, kind="both")


def test_overall_passes_options_to_its_members() -> None:
    score = AGGREGATES["ovr"](
        COLUMNS,
        kind="untargeted",
        ufe_options={"entailment": "entailment_from_generation_proxy"},
    )
    # The proxy is 0 on both rows: UFE is 1 - mean(.3, .2, .5, .5, 0) = .7.
    assert score.value == pytest.approx((0.7 + MU) / 2)
    assert score.note == "ufe: uses 'entailment_from_generation_proxy'"


@pytest.mark.parametrize(
    ("name", "probe", "metric", "options"),
    [
        ("ufe", "forget", "similarity", {}),
        ("tfe", "forget", "refusal_entailment", {}),
        ("mu6", "retain", "entailment_from_generation", {}),
        ("mu9", "real_authors", "probability_normalised", {}),
        ("mu18", "world_facts", "entailment", {}),
        ("ovr", "forget", "similarity", {"kind": "untargeted"}),
        ("forget_quality", "forget", "truth_ratio", {"reference": COLUMNS}),
    ],
)
def test_a_missing_member_is_named(
    name: str, probe: str, metric: str, options: dict[str, Any]
) -> None:
    score = AGGREGATES[name](without(probe, metric), **options)
    assert score.value is None
    assert f"metric '{metric}' was not taken on probe '{probe}'" in str(score.note)


def test_skipped_rows_are_seen_in_a_composite() -> None:
    columns = {**COLUMNS, "forget": {**FORGET, "rouge": [0.3, None]}}
    assert AGGREGATES["ufe"](columns) == Score(
        pytest.approx(UFE), None, "forget/rouge: 1 of 2 rows not measured"
    )


def test_hmean_of_named_scores() -> None:
    members = [
        {"probe": "forget", "metric": "token_entropy"},
        {"aggregate": "fraction", "probe": "forget", "metric": "refusal_entailment"},
    ]
    assert AGGREGATES["hmean"](COLUMNS, members=members).value == pytest.approx(TFE)
    assert AGGREGATES["hmean"](COLUMNS, members=[]).value is None


def test_forget_quality_matches_rows_by_id_and_not_by_order() -> None:
    turned = {**FORGET, "truth_ratio": [2.0, 0.5], "id": ["1", "0"]}
    quality = AGGREGATES["forget_quality"](COLUMNS, reference={"forget": turned})
    assert quality == Score(1.0, 2, None)


def test_forget_quality_refuses_rows_without_a_match() -> None:
    other = {**FORGET, "id": ["0", "2"]}
    nameless = {"truth_ratio": [1.0, 2.0]}
    twice = {**FORGET, "id": ["0", "0"]}
    for reference, reason in (
        (None, "no reference records given"),
        ({"forget": other}, "the reference has other rows: 2 here, 2 there, 2 in one"),
        ({"forget": nameless}, "in the reference: rows of probe 'forget' have no ids"),
        ({"forget": twice}, "in the reference: 1 row ids of probe 'forget' stand twice"),
        ({}, "in the reference: probe 'forget' was not run"),
    ):
        for name in ("forget_quality", "ks_statistic"):
            score = AGGREGATES[name](COLUMNS, reference=reference)
            assert score.value is None
            assert str(score.note).startswith(reason)


def test_privleak_says_its_reference_and_has_no_default() -> None:
    columns = {"forget": {"mia_min_k": [0.0, 1.0]}, "holdout": {"mia_min_k": [2.0, 3.0]}}
    fair = {"forget": {"mia_min_k": [0.0, 1.0]}, "holdout": {"mia_min_k": [0.0, 1.0]}}
    score = AGGREGATES["privleak"](columns, reference=fair)
    assert score == Score(pytest.approx(-100.0), 4, "reference AUC 0.5")
    assert AGGREGATES["privleak"](columns, reference_auc=0.5) == score
    assert AGGREGATES["privleak"](columns).note == "give either reference records or reference_auc"
    assert AGGREGATES["privleak"](columns, reference={}).value is None
    assert AGGREGATES["mia_auc"](columns, metric="mia_min_k").value == 1.0
    assert AGGREGATES["mia_auc"]({"forget": {}}, metric="mia_min_k").value is None
    assert AGGREGATES["mia_auc"]({"forget": {"m": [1.0]}}, metric="m").value is None
