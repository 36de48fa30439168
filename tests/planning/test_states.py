"""States by arithmetic against the tensors that the optimisers keep."""

import pytest
import torch
from models_for_tests import make_trainer, small_tokenizer

from unlearn_llm.models import NewModel, new_model
from unlearn_llm.planning.states import States, states_of

WHOLE = {"optim": "adamw_torch"}
DUAL = {"optimizer": "dual_adamw"}
PLUS = {"optimizer": "dual_adamw_plus"}


def eight(**settings):
    return {"optimizer_parameters": {"state_bits": 8, **settings}}


def model():
    """With weights above and below what is kept in 8 bits, and untied embeddings (Phi)."""
    return new_model(NewModel("phi", hidden_size=64, layers=1, heads=2), small_tokenizer())


def kept_by(trainer) -> int:
    """Bytes of the states after a step of each kind; without what does not grow."""
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in name
    )


@pytest.mark.parametrize(
    "settings",
    [
        *({"optim": name} for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")),
        *({"optim": name} for name in ("rmsprop", "adagrad", "adamw_bnb_8bit", "lion_8bit")),
        DUAL,
        DUAL | eight(),
        PLUS,
        PLUS | eight(),
        PLUS | eight(quantize="base"),
        PLUS | eight(quantize="delta", min_8bit_size=100),
        PLUS | eight() | {"quantize_embeddings": True},
        PLUS | {"trainable": "layers"},
    ],
    ids=str,
)
def test_states_are_those_of_the_optimiser(tmp_path, settings):
    trainer = make_trainer(tmp_path, model(), **settings)
    planned = states_of(
        trainer.model,
        optimizer=settings.get("optimizer"),
        parameters=settings.get("optimizer_parameters", {}),
        optim=trainer.args.optim,
        quantize_embeddings=settings.get("quantize_embeddings", False),
    )
    # Scales come in whole numbers of blocks.
    assert planned.kept == pytest.approx(kept_by(trainer), rel=1e-3)
    assert planned.note is None


def test_a_step_of_a_dual_optimiser_touches_one_role_and_the_base():
    network = torch.nn.Linear(10, 10, bias=False)

    def states(optimizer: str | None) -> States:
        return states_of(network, optimizer=optimizer, parameters={}, optim="adamw_torch")

    # Two moments of 4 bytes for each of 100 entries, by role and for the base.
    assert states(None)[:2] == (800, 800)
    assert states("dual_adamw")[:2] == (1600, 800)
    assert states("dual_adamw_plus")[:2] == (2400, 1600)


@pytest.mark.parametrize("settings", [{"optim": "lomo"}, {"optimizer": "torch.optim:Adam"}])
def test_what_is_not_known_is_said(settings):
    given = {"optimizer": None, "optim": "adamw_torch", "parameters": {}, **settings}
    found = states_of(torch.nn.Linear(10, 10, bias=False), **given)
    assert found.kept == 800
    assert "not known: 8 bytes per parameter are assumed" in found.note
