"""SFRon's weighted ascent and SCRUB in the Trainer: what needs the whole window, and a start."""

import math

import pytest
import torch
from models_for_tests import history, make_trainer, rows_drawn, synthetic_pairs, trained, weights
from test_equivalence import SPLITS, assert_same_run

from unlearn_llm.errors import UserError

ADAGA = {"objective": "adaga+gd", "forget_parameters": {"lambd": 3.0}}
STILL = {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}


def first_loss(tmp_path, **settings):
    return history(trained(tmp_path, **settings, max_steps=1), "forget/loss")[0]


@pytest.mark.parametrize("schedule", ["alternate", "joint"])
def test_weights_are_normalised_over_the_whole_step(tmp_path, schedule):
    # The counterpart, micro-batch means, is another number as soon as answers differ.
    runs = [
        trained(
            tmp_path,
            **ADAGA,
            schedule=schedule,
            max_steps=4,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        for micro, accumulation in SPLITS
    ]
    for run in runs[1:]:
        assert_same_run(run, runs[0])
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    averaged = first_loss(tmp_path, **ADAGA, **split, averaging="micro_batch")
    assert averaged != pytest.approx(history(runs[0], "forget/loss")[0], rel=1e-6)


def test_the_loss_of_a_step_is_the_weighted_mean_of_its_answers(tmp_path):
    drawn = rows_drawn(make_trainer(tmp_path, max_steps=1))
    pairs = [synthetic_pairs("forget10")[draw.forget] for draw in drawn]
    alone = {"per_device_train_batch_size": 1, "objective": "ga+gd"}
    losses = [-first_loss(tmp_path, **alone, forget=[pair]) for pair in pairs]
    weighted = [loss**-3.0 * loss for loss in losses]
    expected = -sum(weighted) / sum(loss**-3.0 for loss in losses)
    plain = -sum(losses) / len(losses)
    found = first_loss(tmp_path, **ADAGA)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(plain, rel=1e-5)


def test_at_the_reference_scrub_has_no_direction_of_its_own(tmp_path):
    # The first forget step is rounding; a retain step gives the next one a direction.
    run = trained(tmp_path, objective="scrub+gd_kl")
    losses, norms = (history(run, f"forget/{key}") for key in ("loss", "grad_norm"))
    assert abs(losses[0]) < 1e-6
    assert norms[0] < 1e-5 < 1e-2 < norms[1]
    assert losses[1] < -1e-4


def test_the_coefficient_falls_along_half_a_cosine(tmp_path):
    runs = {
        schedule: trained(
            tmp_path, objective="ga+gd", forget_weight=2.0, forget_weight_schedule=schedule, **STILL
        )
        for schedule in ("constant", "cosine")
    }
    key = "forget/grad_norm"  # of steps 0 and 3 of 6
    constant, cosine = (history(runs[schedule], key) for schedule in ("constant", "cosine"))
    factors = [(1 + math.cos(math.pi * step / 6)) / 2 for step in (0, 3)]
    for ours, theirs, factor in zip(cosine, constant, factors, strict=True):
        assert ours == pytest.approx(factor * theirs, rel=1e-6)
    key = "retain/grad_norm"
    assert history(runs["cosine"], key) == history(runs["constant"], key)


def test_a_run_resumed_under_a_falling_coefficient_is_the_uninterrupted_run(tmp_path):
    run = {**ADAGA, "forget_weight_schedule": "cosine", "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path, **run)
    resumed = make_trainer(tmp_path, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_coefficient_schedule_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="forget_weight_schedule: expected constant or cosine"):
        make_trainer(tmp_path, forget_weight_schedule="linear")


def test_weights_cost_a_pass_without_gradient_in_forget_steps(tmp_path):
    trainer = make_trainer(tmp_path, **ADAGA, max_steps=3, gradient_accumulation_steps=2)
    passes = []
    trainer.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    # A forget step of two micro-batches: first the weights of both; then two retain steps.
    assert passes == [False, False, True, True, *[True] * 4]
