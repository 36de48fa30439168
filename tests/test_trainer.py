import copy
import math
from pathlib import Path

import pytest
import torch
from models_for_tests import (
    SAVING,
    EveryStep,
    history,
    make_trainer,
    rows_drawn,
    small_tokenizer,
    synthetic_pairs,
    tiny_model,
    trained,
    weights,
)
from safetensors.torch import load_file
from transformers import TrainerCallback

from unlearn_llm.config import UnlearnConfig
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES, Loss, Objective
from unlearn_llm.trainer import UnlearnTrainer


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


# A run that diverges.


def diverging_at(step, value=math.nan):
    """An objective whose forget loss is not finite from the given call on."""
    calls = []

    def loss(policy):
        calls.append(1)
        factor = value if len(calls) > step else 1.0
        return factor * policy["original"].logp

    forget = Loss("diverging", loss, ("original",), "token")
    return Objective(forget, RETAIN_LOSSES["gd"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_at_that_step(tmp_path, value):
    trainer = make_trainer(
        tmp_path,
        max_steps=9,
        schedule_parameters={"forget": 1, "retain": 0},
        given={"objective": diverging_at(4, value)},
    )
    seen = []
    trainer.add_callback(
        EveryStep(
            lambda event, state, kw: seen.append(weights(kw["model"])) if event == "end" else 0
        )
    )
    with pytest.raises(NonFiniteError, match="Step 4: the forget loss is"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert torch.equal(weights(trainer.model), seen[-1])  # the weights of the last good step


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path):
    def loss(policy):
        # sqrt has slope infinity at 0: a finite loss with a gradient of 0 * infinity.
        return (0 * policy["original"].logp).abs().sqrt()

    objective = Objective(Loss("kink", loss, ("original",), "token"), RETAIN_LOSSES["gd"])
    trainer = make_trainer(tmp_path, given={"objective": objective})
    before = weights(trainer.model)
    with pytest.raises(NonFiniteError, match="the forget loss is 0 and the gradient norm nan"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_the_last_good_checkpoint_is_kept_and_named(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=9,
        schedule_parameters={"forget": 1, "retain": 0},
        given={"objective": diverging_at(5)},
        **SAVING,
    )
    with pytest.raises(NonFiniteError, match=r"Last good checkpoint: .*checkpoint-4\."):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    trainer = make_trainer(tmp_path, given={"objective": diverging_at(0)})
    with pytest.raises(NonFiniteError, match="No checkpoint was saved yet"):
        trainer.train()


def test_a_retain_loss_above_its_limit_stops_the_run_before_the_weights_change(tmp_path):
    # The model knows nothing of the retain rows: losses of 6 and 20 nats (seen in the logs).
    trainer = make_trainer(tmp_path, max_retain_loss=5.0, **{**SAVING, "save_steps": 1})
    with pytest.raises(NonFiniteError, match=r"retain loss is [\d.]+ \(max_retain_loss: 5\)"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]  # of the forget step, which has no limit
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(saved.get(name, parameter), parameter)
    assert trained(tmp_path / "far", max_retain_loss=100.0, max_steps=2).state.global_step == 2


def test_a_diverging_micro_batch_in_mid_window_is_seen(tmp_path):
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=1,
        given={"objective": diverging_at(1)},
    )
    with pytest.raises(NonFiniteError, match="Step 0"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def poison(event, state, kw):
        if event == "after" and state.global_step == 3:  # the fourth step, saved as checkpoint-4
            next(kw["model"].parameters()).data[0, 0] = math.nan

    trainer = make_trainer(tmp_path, given={"callbacks": [EveryStep(poison)]}, **SAVING)
    with pytest.raises(NonFiniteError, match=r"holds values that are not finite. No checkpoint"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]


# Logs.


def test_losses_and_gradient_norms_are_logged_by_role(tmp_path):
    trainer = trained(tmp_path)  # forget, retain, retain, twice
    lines = [line for line in trainer.state.log_history if "train_runtime" not in line]
    roles = ["forget", "retain", "retain"] * 2
    for line, role, other in zip(lines, roles, ["retain", "forget", "forget"] * 2, strict=True):
        assert {f"{role}/loss", f"{role}/grad_norm", f"{role}/learning_rate"} <= line.keys()
        assert f"{other}/loss" not in line
        assert not {"loss", "grad_norm", "learning_rate"} & line.keys()


def test_a_joint_step_logs_two_losses_and_one_gradient_norm(tmp_path):
    trainer = trained(tmp_path, schedule="joint", max_steps=2)
    for line in trainer.state.log_history[:2]:
        assert {"forget/loss", "retain/loss", "grad_norm"} <= line.keys()
        assert not {"forget/grad_norm", "retain/grad_norm"} & line.keys()


def test_a_log_line_over_several_steps_holds_means_by_role(tmp_path):
    single = trained(tmp_path / "1", logging_steps=1)
    six = trained(tmp_path / "6", logging_steps=6)
    for key in ("forget/loss", "retain/loss", "forget/grad_norm", "retain/grad_norm"):
        values = history(single, key)
        assert history(six, key) == [pytest.approx(sum(values) / len(values))]


def test_no_mixed_training_loss_is_reported_at_the_end(tmp_path):
    last = trained(tmp_path).state.log_history[-1]
    assert "train_runtime" in last
    assert "train_loss" not in last


def test_the_logged_loss_is_the_token_mean_of_the_rows_drawn(tmp_path):
    trainer = make_trainer(tmp_path, objective="idk+gd", max_steps=1)
    model = copy.deepcopy(trainer.model)
    drawn = rows_drawn(trainer)
    trainer.train()
    total, count = 0.0, 0
    for draw in drawn:
        encoded = trainer.role_rows.rows["forget"][draw.forget]["idk"][1]
        logps = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        for t in range(encoded.n_prompt, len(encoded.ids)):
            total -= logps[t - 1, encoded.ids[t]].item()
            count += 1
    assert history(trainer, "forget/loss") == [pytest.approx(total / count, rel=1e-5)]


def test_the_logged_loss_is_not_multiplied_by_its_weight(tmp_path):
    plain = trained(tmp_path / "1", max_steps=1, forget_weight=1.0)
    heavy = trained(tmp_path / "2", max_steps=1, forget_weight=3.0)
    assert history(plain, "forget/loss") == history(heavy, "forget/loss")
    assert history(heavy, "forget/grad_norm")[0] == pytest.approx(
        3 * history(plain, "forget/grad_norm")[0], rel=1e-5
    )


def test_epochs_are_logged_by_role(tmp_path):
    trainer = trained(tmp_path)  # 2 forget steps, 4 retain steps of 4 rows
    n_retain = len(synthetic_pairs("retain90"))
    assert history(trainer, "forget/epoch") == [0.4] * 3 + [0.8] * 3
    assert history(trainer, "retain/epoch")[-1] == pytest.approx(16 / n_retain)


# Learning rates.


@pytest.mark.parametrize("optimizer", [None, "dual_adamw", "dual_adamw_plus"])
def test_forget_steps_have_a_learning_rate_of_their_own(tmp_path, optimizer):
    used, restored = [], []

    def look(event, state, kw):
        rates = {group["lr"] for group in kw["optimizer"].param_groups}
        (used if event == "before" else restored).append(rates)

    settings = {"learning_rate": 1e-3, "forget_learning_rate": 3e-3, "optimizer": optimizer}
    trainer = make_trainer(tmp_path, **settings)
    trainer.add_callback(EveryStep(look))  # after ForgetLearningRate
    trainer.train()
    assert used == [{3e-3}, {1e-3}, {1e-3}] * 2
    assert restored == [{1e-3}] * 12
    assert history(trainer, "forget/learning_rate") == [pytest.approx(3e-3)] * 2
    assert history(trainer, "retain/learning_rate") == [pytest.approx(1e-3)] * 4


@pytest.mark.parametrize("optimizer", [None, "dual_adamw"])
def test_the_first_forget_step_moves_weights_by_its_own_learning_rate(tmp_path, optimizer):
    # Adam's first step is lr * sign(g): the largest movement is the learning rate (no decay).
    start = weights(tiny_model())
    trainer = trained(
        tmp_path,
        optimizer=optimizer,
        max_steps=1,
        learning_rate=1e-3,
        forget_learning_rate=5e-3,
        weight_decay=0.0,
    )
    moved = (weights(trainer.model) - start).abs().max().item()
    assert moved == pytest.approx(5e-3, rel=1e-3)


def test_both_learning_rates_follow_one_schedule_over_global_steps(tmp_path):
    trainer = trained(
        tmp_path,
        max_steps=6,
        learning_rate=1e-3,
        forget_learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
    # Factors of steps 0 to 5: 0, 1/2, 1, 3/4, 1/2, 1/4.
    assert history(trainer, "forget/learning_rate") == pytest.approx([0, 1.5e-3])
    assert history(trainer, "retain/learning_rate") == pytest.approx([5e-4, 1e-3, 5e-4, 2.5e-4])


# Length of a run.


@pytest.mark.parametrize(
    ("epochs", "schedule", "parameters", "steps"),
    [  # 10 forget rows, windows of 4: 2.5 steps a pass
        (1, "joint", {}, 3),
        (2, "joint", {}, 5),
        (2, "alternate", {"forget": 1, "retain": 5}, 30),
        (0.1, "alternate", {"forget": 1, "retain": 1}, 2),
    ],
)
def test_epochs_are_passes_over_the_forget_set(tmp_path, epochs, schedule, parameters, steps):
    trainer = make_trainer(
        tmp_path,
        max_steps=-1,
        num_train_epochs=epochs,
        schedule=schedule,
        schedule_parameters=parameters,
    )
    assert trainer.args.max_steps == steps


def test_a_run_ends_after_max_steps(tmp_path):
    assert trained(tmp_path, max_steps=5).state.global_step == 5


def test_the_callers_settings_stay_as_they_were(tmp_path):
    settings = UnlearnConfig(
        output_dir=str(tmp_path), use_cpu=True, num_train_epochs=1, report_to="none"
    )
    before = settings.to_dict()
    UnlearnTrainer(
        tiny_model(),
        settings,
        forget_dataset=synthetic_pairs("forget10"),
        retain_dataset=synthetic_pairs("retain90"),
        processing_class=small_tokenizer(),
        encoder=Encoder(small_tokenizer(), "plain"),
    )
    assert settings.to_dict() == before
    assert settings.max_steps == -1


# Callbacks and evaluation.


def test_the_users_callbacks_are_called(tmp_path):
    seen = []
    trained(
        tmp_path,
        max_steps=3,
        given={"callbacks": [EveryStep(lambda event, state, kw: seen.append(event))]},
    )
    assert seen == ["before", "after", "end"] * 3


def test_a_callback_may_stop_the_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = trained(tmp_path, given={"callbacks": [Stop()]})
    assert trainer.state.global_step == 2


def test_evaluation_steps_ask_the_users_function(tmp_path):
    asked = []

    def evaluate_model(model):
        asked.append(weights(model))
        return {"forget_rouge": 0.25 * len(asked)}

    trainer = trained(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        given={"evaluate_model": evaluate_model},
    )
    assert history(trainer, "eval_forget_rouge") == [0.25, 0.5]
    assert torch.equal(asked[-1], weights(trainer.model))


def test_the_best_checkpoint_is_chosen_by_a_score_of_the_user(tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    trainer = trained(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="ovr",
        greater_is_better=True,
        given={"evaluate_model": lambda model: {"ovr": next(scores)}},
        **SAVING,
    )
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"


def test_evaluating_changes_no_weight_and_no_draw(tmp_path):
    plain = trained(tmp_path / "plain")

    def draw_numbers(model):
        torch.rand(3)
        return {"x": 1.0}

    evaluated = trained(
        tmp_path / "evaluated",
        eval_strategy="steps",
        eval_steps=1,
        given={"evaluate_model": draw_numbers},
    )
    assert torch.equal(weights(plain.model), weights(evaluated.model))


def test_evaluating_without_a_function_is_an_answer(tmp_path):
    with pytest.raises(UserError, match=r"give UnlearnTrainer\(evaluate_model="):
        make_trainer(tmp_path).evaluate()
    with pytest.raises(UserError, match="or set eval_strategy: no"):
        make_trainer(tmp_path, eval_strategy="epoch")


# Every loss, with what it needs.


@pytest.mark.parametrize("name", [*FORGET_LOSSES])
def test_every_forget_loss_takes_a_step(tmp_path, name):
    forget = [
        pair._replace(alternate=f"Maybe {pair.answer}") for pair in synthetic_pairs("forget10")
    ]
    before = weights(tiny_model())
    parameters = {"layers": [0]} if FORGET_LOSSES[name].layers else {}
    trainer = trained(
        tmp_path,
        objective=f"{name}+gd",
        forget_parameters=parameters,
        max_steps=1,
        forget=forget,
    )
    assert math.isfinite(history(trainer, "forget/loss")[0])
    assert not torch.equal(weights(trainer.model), before)
