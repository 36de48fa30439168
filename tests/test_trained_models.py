import copy

import pytest
import torch
from models_for_tests import (
    EveryStep,
    history,
    make_trainer,
    small_tokenizer,
    synthetic_pairs,
    tiny_model,
    trained,
    weights,
)

from unlearn_llm.config import UnlearnConfig
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.trainer import UnlearnTrainer


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
