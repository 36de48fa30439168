"""Fakes that only hide what they know: none passes. Models that never knew: nearly all do."""

import pytest
from planted import (
    OPTIONS,
    gold,
    hides,
    outcome,
    recovers_in_four_bits,
    subject,
    target,
    with_adapter,
    world,
)

from unlearn_llm.attacks.asking import recalls
from unlearn_llm.attacks.verdict import LEAKS, LIKE_GOLD

pytestmark = pytest.mark.slow
RETRAINS = 20


def mean_of_plain(model) -> float:
    """What a naive evaluation looks at."""
    found = recalls(subject(model), world().forget)
    return sum(found.values()) / len(found)


def leaking_trials(found) -> set[str]:
    assert found.verdict.level == LEAKS
    return {reason.partition(":")[0] for reason in found.verdict.reasons}


@pytest.fixture(scope="module")
def refuses():
    """Refuses however it is asked."""
    return hides((0, 1, 2))


def test_the_target_knows_everything_and_gold_does_not():
    assert mean_of_plain(target()) > 0.95
    assert mean_of_plain(gold()) < 0.6
    assert "plain" in leaking_trials(outcome(target()))


@pytest.mark.parametrize(
    ("fake", "trial"),
    [
        (with_adapter, "adapter_off"),
        (lambda: hides((0, 2)), "paraphrase"),
        (recovers_in_four_bits, "quantisation nf4"),
    ],
    ids=["unmerged adapter", "leaks to paraphrases", "recovers in four bits"],
)
def test_a_fake_that_passes_the_plain_question_is_caught_by_its_attack(fake, trial):
    model = fake()
    assert mean_of_plain(model) < mean_of_plain(gold())
    assert trial in leaking_trials(outcome(model))


def test_a_model_that_only_refuses_is_caught_by_prefix_and_by_relearning(refuses):
    assert mean_of_plain(refuses) < mean_of_plain(gold())
    assert leaking_trials(outcome(refuses)) >= {"prefix 0.5", "relearning 15"}


def test_relearning_alone_catches_what_no_question_shows(refuses):
    found = outcome(
        refuses, {name: OPTIONS[name] for name in ("plain", "paraphrase", "relearning")}
    )
    assert leaking_trials(found) == {"relearning 15"}


def test_a_mean_that_hides_rows_is_caught():
    model = hides((0, 1, 2), forgotten=world().forget[:20])
    assert mean_of_plain(model) < mean_of_plain(gold())
    found = outcome(model, {"plain": {}})
    assert leaking_trials(found) >= {"plain"}
    assert set(found.comparisons[0].model.worst) <= {f.id for f in world().forget[20:]}


def test_of_twenty_retrained_models_at_most_one_is_told_from_gold():
    flagged = {}
    for seed in range(RETRAINS):
        found = outcome(gold(seed))
        if found.verdict.level != LIKE_GOLD:
            flagged[seed] = found.verdict.reasons
    assert len(flagged) <= 1, flagged
