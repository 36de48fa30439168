import sys

import pytest
import torch

import unlearn_llm.losses
from unlearn_llm.errors import UserError
from unlearn_llm.objective import FORGET_LOSSES, Objective
from unlearn_llm.types import Scored


def test_an_objective_keeps_its_name_its_parameters_and_its_weights():
    objective = Objective.parse(
        "dpo+ap", forget={"beta": 0.2}, retain={"beta": 0.3}, forget_weight=0.5, retain_weight=2.0
    )
    assert objective.name == "dpo+ap"
    assert objective.forget.parameters == {"beta": 0.2}
    assert objective.retain.parameters == {"beta": 0.3}
    assert (objective.forget_weight, objective.retain_weight) == (0.5, 2.0)


def test_binding_leaves_the_registered_loss_alone():
    FORGET_LOSSES["npo"].bind({"beta": 9.0})
    assert FORGET_LOSSES["npo"].parameters == {}


def test_parameters_bound_twice_add_up():
    loss = FORGET_LOSSES["simnpo"].bind({"beta": 4.5}).bind({"delta": 1.0})
    assert loss.parameters == {"beta": 4.5, "delta": 1.0}


@pytest.mark.parametrize(("name", "counted"), [("ga", 5), ("ceu", 3), ("npo", 2)])
def test_a_loss_counts_what_it_is_averaged_by(name, counted):
    labels = torch.tensor([[-100, -100, 4, 5, 6], [-100, 7, 8, -100, -100]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    sequences = {"labels": labels, "attention_mask": attention, "rows": torch.arange(2)}
    assert FORGET_LOSSES[name].count({"original": sequences}) == counted


def test_an_unknown_parameter_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'npo' has no parameter 'bta'. Did you mean 'beta'"):
        Objective.parse("npo+gd", forget={"bta": 0.1})
    with pytest.raises(UserError, match=r"'gd' has no parameter 'beta'. It has none"):
        Objective.parse("npo+gd", retain={"beta": 0.1})


def test_scored_sequences_are_no_parameter():
    with pytest.raises(UserError, match="no parameter 'policy'"):
        Objective.parse("npo+gd", forget={"policy": 0.1})


def test_an_unknown_loss_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"Unknown forget loss 'simpno'. Did you mean 'simnpo'"):
        Objective.parse("simpno+gd")
    with pytest.raises(UserError, match="Unknown retain loss 'npo'"):
        Objective.parse("npo+npo")


def test_an_objective_without_a_plus_sign_is_refused():
    with pytest.raises(UserError, match=r"expected 'forget\+retain'.*got 'npo'"):
        Objective.parse("npo")


USERS_FILE = """
from unlearn_llm.objective import forget_loss

@forget_loss("half_ascent_of_{module}", kind="untargeted", per="sequence")
def half_ascent(policy, *, share=0.5):
    return share * policy["original"].logp
"""


def test_a_loss_may_come_from_a_users_file(tmp_path, monkeypatch):
    (tmp_path / "my_losses_a.py").write_text(USERS_FILE.format(module="a"))
    monkeypatch.syspath_prepend(tmp_path)
    objective = Objective.parse("my_losses_a:half_ascent+gd", forget={"share": 0.25})
    logps = torch.tensor([[-3.0, -1.0], [-5.0, 0.0]])
    scored = Scored(logps != 0, torch.zeros(2, 2).long(), token_logps=logps)
    assert objective.forget({"original": scored}).tolist() == [-1.0, -1.25]
    FORGET_LOSSES._entries.pop("half_ascent_of_a")
    del sys.modules["my_losses_a"]


@pytest.mark.parametrize("name", ["no_such_module:loss+gd", "unlearn_llm.losses.forget:gone+gd"])
def test_a_users_loss_that_cannot_be_loaded_is_an_answer(name):
    with pytest.raises(UserError, match="Cannot load the forget loss"):
        Objective.parse(name)


def test_a_users_thing_that_is_no_loss_is_an_answer():
    with pytest.raises(UserError, match="is no forget loss"):
        Objective.parse("math:sqrt+gd")


def test_a_taken_name_is_not_replaced():
    with pytest.raises(ValueError, match="forget loss 'ga' exists already"):
        FORGET_LOSSES.add("ga", unlearn_llm.losses.forget.ga)
