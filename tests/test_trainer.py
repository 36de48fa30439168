import copy
import json
import math
from pathlib import Path

import pytest
import torch
from models_for_tests import (
    history,
    make_trainer,
    small_tokenizer,
    synthetic_pairs,
    tiny_model,
    weights,
)
from transformers import TrainerCallback

from unlearn_llm.config import UnlearnConfig
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES, Loss, Objective
from unlearn_llm.schedule import Alternate
from unlearn_llm.trainer import UnlearnTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2}


def trained(tmp_path, model=None, **settings):
    trainer = make_trainer(tmp_path, model, **settings)
    trainer.train()
    return trainer


def rows_drawn(trainer):
    return [draw for batch in trainer.get_train_dataloader().batch_sampler for draw in batch]


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


class EveryStep(TrainerCallback):
    """Calls a function at every event of the Trainer, with the event's name."""

    def __init__(self, function):
        self.function = function

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.function("before", state, kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.function("after", state, kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.function("end", state, kwargs)


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
        EveryStep(lambda event, state, kw: seen.append(weights(kw["model"])) if event == "end" else 0)
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
    with pytest.raises(NonFiniteError, match="holds values that are not finite. No checkpoint"):
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


# What trains.


def test_only_parameters_that_match_the_expression_train(tmp_path):
    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(tmp_path, model, trainable=r"layers\.1\.mlp")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {
        f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_an_expression_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no parameter matches 'atention'.*names look like"):
        make_trainer(tmp_path, trainable="atention")


def test_trainable_bfloat16_weights_are_kept_in_float32(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    start = weights(model).float()
    trained(tmp_path, model, learning_rate=1e-6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # A step of 1e-6 is below bfloat16's resolution at 0.02 (6e-5), and must not be lost.
    moved = (weights(model) - start).abs()
    assert 1e-7 < moved.median().item() < 1e-5


def test_frozen_bfloat16_weights_stay_bfloat16(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    trained(tmp_path, model, trainable=r"layers\.1\.mlp", bf16=True)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_bfloat16_autocast_trains(tmp_path):
    trainer = trained(tmp_path, bf16=True, objective="dpo+kl")
    exact = trained(tmp_path / "exact", objective="dpo+kl")
    for key in ("forget/loss", "retain/loss"):
        ours, theirs = history(trainer, key), history(exact, key)
        assert ours == pytest.approx(theirs, rel=0.05, abs=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_trains_an_adapter_as_without(tmp_path, use_reentrant):
    # Trap 16: without care the checkpointed blocks give the adapter no gradient at all.
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(lora=True)
        found = {}

        def look(event, state, kw, found=found):
            if event == "before":
                for name, parameter in kw["model"].named_parameters():
                    if parameter.grad is not None:
                        found[name] = parameter.grad.clone()

        make_trainer(
            tmp_path,
            model,
            max_steps=2,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
            given={"callbacks": [EveryStep(look)]},
        ).train()
        gradients.append(found)
    assert len(gradients[0]) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    assert all(bool(grad.any()) for grad in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_tokenizer_without_pad_token_trains_the_same(tmp_path):
    ends = []
    for pad in ("<pad>", None):
        tokenizer = copy.deepcopy(small_tokenizer())
        tokenizer.pad_token = pad
        trainer = UnlearnTrainer(
            tiny_model(),
            UnlearnConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                max_steps=3,
                per_device_train_batch_size=4,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                dataloader_pin_memory=False,
            ),
            forget_dataset=synthetic_pairs("forget10"),
            retain_dataset=synthetic_pairs("retain90"),
            processing_class=tokenizer,
            encoder=Encoder(tokenizer, "plain"),
        )
        trainer.train()
        ends.append(weights(trainer.model))
    torch.testing.assert_close(ends[0], ends[1])


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


# Combinations that cannot work.


@pytest.mark.parametrize("optimizer", ["dual_adamw", "dual_adamw_plus"])
def test_dual_optimisers_are_refused_for_joint_steps(tmp_path, optimizer):
    with pytest.raises(UserError, match="keeps one state per role.*Use schedule: alternate"):
        make_trainer(tmp_path, optimizer=optimizer, schedule="joint")


def test_a_forget_learning_rate_is_refused_for_joint_steps(tmp_path):
    with pytest.raises(UserError, match="forget_learning_rate needs steps that train one role"):
        make_trainer(tmp_path, forget_learning_rate=1e-4, schedule="joint")


@pytest.mark.parametrize("option", ["split_batches", "dispatch_batches"])
def test_dealing_out_parts_of_batches_is_refused(tmp_path, option):
    with pytest.raises(UserError, match="must be off"):
        make_trainer(tmp_path, accelerator_config={option: True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove_unused_columns": True}, "must be false"),
        ({"logging_nan_inf_filter": True}, "must be false"),
        ({"pairing": "same"}, "pairing: expected random or fixed, got 'same'"),
        ({"averaging": "mean"}, "averaging: expected window or micro_batch"),
        ({"reference": "copy"}, "reference: expected auto"),
        ({"schedule": "alternating"}, "Did you mean 'alternate'"),
        ({"schedule_parameters": {"forgets": 1}}, "schedule_parameters of 'alternate'"),
        ({"optimizer": "dual_adam"}, "Did you mean 'dual_adamw'"),
        ({"objective": "idk"}, r"expected 'forget\+retain'"),
        ({"forget_parameters": {"beta": 1}}, "'idk' has no parameter 'beta'"),
        ({"max_steps": -1, "schedule_parameters": {"forget": 0, "retain": 1}}, "Set max_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_an_empty_data_set_is_refused(tmp_path, role):
    with pytest.raises(UserError, match=f"the {role} set holds no rows"):
        make_trainer(tmp_path, **{role: []})


def test_a_refused_combination_leaves_the_model_alone(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    with pytest.raises(UserError):
        make_trainer(tmp_path, model, schedule="joint", optimizer="dual_adamw", trainable="mlp")
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, True)}


# Resume.


def test_a_checkpoint_brings_its_plan(tmp_path):
    trained(tmp_path, **SAVING)
    plan = json.loads((tmp_path / "checkpoint-2" / "unlearn_plan.json").read_text())
    assert plan["schedule"] == "Alternate(forget=1, retain=2)"
    assert plan["window"] == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 5},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"schedule_parameters": {"forget": 1, "retain": 5}},
        {"objective": "npo+gd"},
        {"retain": synthetic_pairs("retain90")[:-1]},
        {"schedule": "joint"},
        {"pairing": "fixed"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_checkpoint_of_another_plan_is_refused(tmp_path, changed):
    trained(tmp_path, max_steps=2, **SAVING)
    other = make_trainer(tmp_path, **{"max_steps": 2, **SAVING, **changed})
    with pytest.raises(UserError, match="was made with .*this run has.*would draw other rows"):
        other.train(resume_from_checkpoint=True)


def test_a_folder_without_a_plan_is_no_checkpoint_of_ours(tmp_path):
    trainer = trained(tmp_path, max_steps=2, **SAVING)
    (tmp_path / "checkpoint-2" / "unlearn_plan.json").unlink()
    with pytest.raises(UserError, match="is no checkpoint of an unlearning run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_where_nothing_was_saved_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_finished_run_may_be_prolonged(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=6)
    trained(tmp_path / "parts", max_steps=4, **SAVING)
    longer = make_trainer(tmp_path / "parts", max_steps=6, **SAVING)
    longer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(longer.model), weights(whole.model))


# Identities: settings that must mean the same.


def test_alternate_1_0_reads_forget_rows_only(tmp_path):
    trainer = trained(tmp_path, schedule_parameters={"forget": 1, "retain": 0})
    assert len(history(trainer, "forget/loss")) == 6
    assert history(trainer, "retain/loss") == []


@pytest.mark.parametrize("side", ["forget", "retain"])
@pytest.mark.parametrize("objective", ["idk+gd", "npo+ap"])
def test_a_joint_run_with_weight_0_on_one_side_is_a_run_of_the_other(tmp_path, side, objective):
    absent = "retain" if side == "forget" else "forget"
    joint = trained(
        tmp_path, schedule="joint", objective=objective, **{f"{absent}_weight": 0.0}
    )
    alone = trained(
        tmp_path, schedule="alternate", objective=objective,
        schedule_parameters={side: 1, absent: 0},
    )  # fmt: skip
    assert torch.equal(weights(joint.model), weights(alone.model))


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_dual_adamw_with_one_role_only_is_adamw(tmp_path, side):
    other = "retain" if side == "forget" else "forget"
    settings = {"schedule_parameters": {side: 1, other: 0}, "max_steps": 10}
    dual = trained(tmp_path, optimizer="dual_adamw", **settings)
    adamw = trained(tmp_path, optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.95, **settings)
    # torch's fused AdamW orders the same operations differently: float32 rounding.
    torch.testing.assert_close(weights(dual.model), weights(adamw.model), rtol=0, atol=2e-6)


def test_twice_the_weight_is_twice_the_loss_for_a_linear_optimiser(tmp_path):
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1e-2), None

    ends = []
    for weight, loss in ((2.0, 1.0), (1.0, 2.0)):
        model = tiny_model()

        def scaled(policy, loss=loss):
            return -loss * policy["original"].logp

        objective = Objective(
            Loss("scaled", scaled, ("original",), "token"),
            RETAIN_LOSSES["gd"],
            forget_weight=weight,
        )
        given = {"objective": objective, "optimizers": sgd(model)}
        ends.append(weights(trained(tmp_path, model, given=given).model))
    torch.testing.assert_close(ends[0], ends[1])


def test_objects_given_win_over_names_in_the_settings(tmp_path):
    objective = Objective(FORGET_LOSSES["me"], RETAIN_LOSSES["gd"])
    trainer = make_trainer(
        tmp_path, objective="npo+kl", given={"objective": objective, "schedule": Alternate(2, 1)}
    )
    assert trainer.objective.name == "me+gd"
    assert trainer.schedule == Alternate(2, 1)


def test_micro_batch_averaging_is_the_mean_of_micro_batch_means(tmp_path):
    # The authors' reduction: two micro-batches of two rows, each with its own token mean.
    trainer = make_trainer(
        tmp_path,
        objective="idk+gd",
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        averaging="micro_batch",
        schedule_parameters={"forget": 0, "retain": 1},
    )
    model = copy.deepcopy(trainer.model)
    drawn = [draw.retain for draw in rows_drawn(trainer)]
    trainer.train()
    means = []
    for pair in (drawn[:2], drawn[2:]):
        terms = []
        for row in pair:
            encoded = trainer.role_rows.rows["retain"][row]["original"][1]
            logps = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
            for t in range(encoded.n_prompt, len(encoded.ids)):
                terms.append(-logps[t - 1, encoded.ids[t]].item())
        means.append(sum(terms) / len(terms))
    assert history(trainer, "retain/loss") == [pytest.approx(sum(means) / 2, rel=1e-5)]
