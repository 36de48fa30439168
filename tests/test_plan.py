import json

import pytest
import torch
from models_for_tests import (
    SAVING,
    make_trainer,
    synthetic_pairs,
    trained,
    weights,
)

from unlearn_llm.checkpoints import commit
from unlearn_llm.errors import UserError


def test_a_checkpoint_brings_its_plan(tmp_path):
    trained(tmp_path, **SAVING)
    plan = json.loads((tmp_path / "checkpoint-2" / "unlearn_plan.json").read_text())
    assert plan["schedule"] == "Alternate(forget=1, retain=2, forget_cycles=None)"
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
    with pytest.raises(UserError, match=r"was made with .*this run has.*would draw other rows"):
        other.train(resume_from_checkpoint=True)


def test_a_folder_without_a_plan_is_no_checkpoint_of_ours(tmp_path):
    trainer = trained(tmp_path, max_steps=2, **SAVING)
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "unlearn_plan.json").unlink()
    commit(checkpoint.rename(tmp_path / "staged"), checkpoint)  # whole, but of the plain Trainer
    with pytest.raises(UserError, match="is no checkpoint of an unlearning run"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_resuming_where_nothing_was_saved_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_finished_run_may_be_prolonged(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=6)
    trained(tmp_path / "parts", max_steps=4, **SAVING)
    longer = make_trainer(tmp_path / "parts", max_steps=6, **SAVING)
    longer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(longer.model), weights(whole.model))
