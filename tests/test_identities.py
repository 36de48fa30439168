"""Settings that must mean the same."""

import copy

import pytest
import torch
from models_for_tests import (
    history,
    make_trainer,
    rows_drawn,
    tiny_model,
    trained,
    weights,
)

from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES, Loss, Objective
from unlearn_llm.schedule import Alternate


def test_alternate_1_0_reads_forget_rows_only(tmp_path):
    trainer = trained(tmp_path, schedule_parameters={"forget": 1, "retain": 0})
    assert len(history(trainer, "forget/loss")) == 6
    assert history(trainer, "retain/loss") == []


@pytest.mark.parametrize("side", ["forget", "retain"])
@pytest.mark.parametrize("objective", ["idk+gd", "npo+ap"])
def test_a_joint_run_with_weight_0_on_one_side_is_a_run_of_the_other(tmp_path, side, objective):
    absent = "retain" if side == "forget" else "forget"
    joint = trained(tmp_path, schedule="joint", objective=objective, **{f"{absent}_weight": 0.0})
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
