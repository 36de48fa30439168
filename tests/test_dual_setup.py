"""What a dual optimiser is told of the model, in a Trainer and without one."""

from types import SimpleNamespace

import pytest
import torch
from models_for_tests import SAVING, history, make_trainer, tiny_model, trained, weights

from unlearn_llm.dual_setup import observations, set_up
from unlearn_llm.optim import DualAdamW, DualAdamWPlus

EIGHT = {"state_bits": 8, "min_8bit_size": 256}
PLUS = {"optimizer": "dual_adamw_plus", "optimizer_parameters": EIGHT}


def widths(trainer):
    """Width of the moments by name of the parameter, after a run."""
    optimizer = trainer.optimizer.optimizer  # accelerate's wrapper
    return {
        name: 8 if optimizer.state[param]["forget_mean"].dtype == torch.uint8 else 32
        for name, param in trainer.model.named_parameters()
        if param.requires_grad
    }


def embeddings_of(model):
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }


@pytest.mark.parametrize("family", ["llama", "phi"], ids=["tied head", "untied head"])
def test_embeddings_keep_float32_moments(tmp_path, family):
    trainer = trained(tmp_path, tiny_model(family), max_steps=2, **PLUS)
    found = widths(trainer)
    matrices = {name for name, p in trainer.model.named_parameters() if p.numel() >= 256}
    embeddings = embeddings_of(trainer.model)
    assert embeddings <= matrices
    assert {name for name, width in found.items() if width == 8} == matrices - embeddings
    assert ("lm_head.weight" in found) == (family == "phi")
    if family == "phi":
        assert found["lm_head.weight"] == 8


@pytest.mark.parametrize("family", ["llama", "phi"], ids=["tied head", "untied head"])
def test_embeddings_are_quantized_where_that_is_asked(tmp_path, family):
    model = tiny_model(family)
    trainer = trained(tmp_path, model, max_steps=1, quantize_embeddings=True, **PLUS)
    found = widths(trainer)
    assert all(found[name] == 8 for name in embeddings_of(model))
    plain = make_trainer(tmp_path, tiny_model(family))  # as many groups as ever
    assert len(trainer.optimizer.param_groups) == len(plain.create_optimizer().param_groups)


def test_a_model_without_trainable_embeddings_gets_no_group_more(tmp_path):
    trainer = trained(tmp_path, tiny_model(lora=True), max_steps=1, **{
        **PLUS, "optimizer_parameters": {"state_bits": 8, "min_8bit_size": 1}
    })  # fmt: skip
    plain = make_trainer(tmp_path, tiny_model(lora=True))
    assert len(trainer.optimizer.param_groups) == len(plain.create_optimizer().param_groups)
    assert set(widths(trainer).values()) == {8}


def test_other_optimizers_are_left_alone(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [dict(group) for group in optimizer.param_groups]
    set_up(optimizer, model, quantize_embeddings=False)
    assert [dict(group) for group in optimizer.param_groups] == before
    assert len(make_trainer(tmp_path).create_optimizer().param_groups) == 2


def test_32_bit_moments_need_no_group_of_their_own():
    model = tiny_model()
    optimizer = DualAdamW(model.parameters())
    set_up(optimizer, model, quantize_embeddings=False)
    assert len(optimizer.param_groups) == 1


def test_an_embedding_in_a_group_of_its_own_stays_there():
    embedding = torch.nn.Embedding(300, 16)
    optimizer = DualAdamW(embedding.parameters(), **EIGHT)
    set_up(optimizer, embedding, quantize_embeddings=False)
    (group,) = optimizer.param_groups
    assert group["state_bits"] == 32


@pytest.mark.parametrize("named", [True, False])
def test_every_parameter_keeps_its_settings_and_its_name(named):
    model = tiny_model("phi")
    names = dict(model.named_parameters())
    optimizer = DualAdamWPlus(
        [{"params": list(names.items() if named else names.values()), "weight_decay": 0.25}],
        lr=3e-4,
        max_update=5.0,
        **EIGHT,
    )
    set_up(optimizer, model, quantize_embeddings=False)
    set_up(optimizer, model, quantize_embeddings=False)  # twice does no harm
    first, second = optimizer.param_groups
    assert [first["state_bits"], second["state_bits"]] == [8, 32]
    for group in (first, second):
        assert (group["lr"], group["weight_decay"], group["max_update"]) == (3e-4, 0.25, 5.0)
        assert not group["refuse_nonfinite"]
        if named:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                assert names[name] is param
    assert [id(param) for param in second["params"]] == [
        id(names[name]) for name in names if name in embeddings_of(model)
    ]
    kept = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert kept == {id(param) for param in names.values()}


# A run.


@pytest.mark.parametrize(
    ("optimizer", "rounding"), [("dual_adamw", "nearest"), ("dual_adamw_plus", "stochastic")]
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, optimizer, rounding):
    settings = {
        **SAVING,
        "optimizer": optimizer,
        "optimizer_parameters": {**EIGHT, "rounding": rounding},
        "lr_scheduler_type": "linear",
        "forget_learning_rate": 2e-3,
        "max_steps": 5,
    }
    whole = trained(tmp_path, **settings)
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert 8 in widths(whole).values()
    assert widths(whole) == widths(resumed)
    for key in ("retain/learning_rate", "forget/learning_rate"):
        assert history(whole, key)[-1] == history(resumed, key)[-1]


def test_all_groups_follow_the_schedule_of_the_learning_rate(tmp_path):
    trainer = trained(tmp_path, lr_scheduler_type="linear", max_steps=4, **PLUS)
    assert len(trainer.optimizer.param_groups) == 3
    # Linear to zero in four steps of the scheduler.
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0] * 3
    rates = history(trainer, "retain/learning_rate")
    assert rates == sorted(rates, reverse=True)
    assert rates == pytest.approx([0.75e-3, 0.5e-3])  # the first and the fourth are of forgetting


KEYS = {"forget/negative_square", "forget/largest_update",
        "retain/negative_square", "retain/largest_update"}  # fmt: skip


@pytest.mark.parametrize("bits", [32, 8])
def test_dualoptim_plus_logs_what_its_steps_met(tmp_path, bits):
    parameters = {**EIGHT, "state_bits": bits}
    trainer = trained(tmp_path, optimizer="dual_adamw_plus", optimizer_parameters=parameters)
    assert set().union(*trainer.state.log_history) >= KEYS
    largest = history(trainer, "forget/largest_update")
    assert len(largest) == 2  # forget steps of the six
    # A first step is Adam's: g / (|g| + eps).
    assert largest[0] == pytest.approx(1, rel=1e-3)
    assert history(trainer, "forget/negative_square")[0] == 0
    assert all(0 <= fraction < 1 for fraction in history(trainer, "retain/negative_square"))


@pytest.mark.parametrize("optimizer", [None, "dual_adamw"])
def test_other_optimizers_log_nothing_of_the_kind(tmp_path, optimizer):
    trainer = trained(tmp_path, optimizer=optimizer, max_steps=3)
    assert not KEYS & set().union(*trainer.state.log_history)


def test_observations_are_found_behind_a_wrapper_and_given_once():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = DualAdamWPlus([param])
    param.grad = torch.ones(3)
    optimizer.step()
    wrapped = SimpleNamespace(optimizer=optimizer)
    assert observations(wrapped).keys() == {"retain/negative_square", "retain/largest_update"}
    assert observations(wrapped) == {}
    assert observations(torch.optim.AdamW([param])) == {}
    assert observations(None) == {}


# Refusals.
