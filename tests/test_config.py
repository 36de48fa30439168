import pytest
import torch
from models_for_tests import (
    make_trainer,
    synthetic_pairs,
    tiny_model,
)

from unlearn_llm.config import UnlearnConfig
from unlearn_llm.errors import UserError


@pytest.mark.parametrize("optimizer", ["dual_adamw", "dual_adamw_plus"])
def test_dual_optimisers_are_refused_for_joint_steps(tmp_path, optimizer):
    with pytest.raises(UserError, match=r"keeps one state per role.*Use schedule: alternate"):
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


def test_fp16_is_refused(tmp_path):
    with pytest.raises(UserError, match="fp16: its loss scaling overflows"):
        UnlearnConfig(str(tmp_path), fp16=True)


def test_a_part_that_trains_in_float32_beside_frozen_bfloat16_needs_autocast(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(UserError, match="Set bf16: true"):
        make_trainer(tmp_path, model=model, trainable="layers.0")


def test_the_trainers_betas_and_eps_reach_a_dual_optimiser(tmp_path):
    config = UnlearnConfig(
        str(tmp_path), optimizer="dual_adamw", adam_beta2=0.99, adam_epsilon=1e-6
    )
    _, settings = config.build_optimizer()
    assert (settings["betas"], settings["eps"]) == ((0.9, 0.99), 1e-6)


def test_parameters_of_the_optimiser_win_over_the_trainers(tmp_path):
    config = UnlearnConfig(
        str(tmp_path), optimizer="dual_adamw", optimizer_parameters={"betas": [0.8, 0.9]}
    )
    assert config.build_optimizer()[1]["betas"] == [0.8, 0.9]


def test_forget_rows_in_the_retain_set_are_refused_in_python_too(tmp_path):
    with pytest.raises(UserError, match="forget rows also stand in the retain set"):
        make_trainer(tmp_path, retain=synthetic_pairs("full"))


def test_rows_beyond_the_context_are_refused_in_python_too(tmp_path):
    model = tiny_model()
    model.config.max_position_embeddings = 20
    with pytest.raises(UserError, match="more tokens than the model reads, 20"):
        make_trainer(tmp_path, model)
