import pytest
import torch
from models_for_tests import (
    history,
    make_trainer,
    small_tokenizer,
    synthetic_pairs,
    tiny_model,
    train_adapter_a_little,
    trained,
    weights,
)
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_llm.dataset import Collator, EncodedRows
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.objective import FORGET_LOSSES
from unlearn_llm.scoring import score, unwrapped

FIRST = {"layers": [0]}
RMU = {
    "objective": "rmu+embed_diff",
    "forget_parameters": FIRST,
    "retain_parameters": FIRST,
}


@pytest.fixture(scope="module")
def sequences():
    encoder = Encoder(small_tokenizer(), "plain")
    rows = EncodedRows(synthetic_pairs("forget10")[:4], encoder)
    return {"original": Collator(pad_id=0).sequences([rows[row]["original"] for row in range(4)])}


def gpt2():
    sizes = {"vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **sizes, **dropouts)
    ).eval()


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "phi": lambda: tiny_model("phi"),
    "gpt2": gpt2,
    "lora": lambda: train_adapter_a_little(tiny_model("llama", lora=True)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_hidden_states_are_what_the_next_layer_gets(sequences, make):
    model, part = make(), sequences["original"]
    with torch.no_grad():
        (found,) = score(model, sequences, layers=[0]).values()
        # The model's own list starts with the embeddings: item 1 is what layer 0 puts out.
        states = model(
            part["input_ids"], attention_mask=part["attention_mask"], output_hidden_states=True
        ).hidden_states[1]
    torch.testing.assert_close(found.hidden[0], states[:, :-1][found.mask])
    assert set(found.hidden) == {0}


def test_without_layers_nothing_is_hooked_or_kept(sequences):
    model = tiny_model()
    hooked = []
    for module in model.modules():
        module.register_forward_hook(
            lambda block, args, output: hooked.append(len(block._forward_hooks))
        )
    with torch.no_grad():
        assert score(model, sequences)["original"].hidden == {}
        assert set(hooked) == {1}  # this test's own
        score(model, sequences, layers=[1])
        assert set(hooked) == {1, 2}
        hooked.clear()
        score(model, sequences)
    assert set(hooked) == {1}


def gradients(model, sequences):
    loss = FORGET_LOSSES["rmu"].bind(FIRST)
    loss(score(model, sequences, layers=loss.layers)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_checkpointing_changes_no_gradient(sequences, make, reentrant):
    plain = gradients(make().train(), sequences)
    model = make().train()
    unwrapped(model).activation_checkpointing_enable({"use_reentrant": reentrant})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    for name, grad in gradients(model, sequences).items():
        torch.testing.assert_close(grad, plain[name])


def test_a_loss_that_could_change_nothing_is_refused(sequences):
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".layers.1." in name
    with pytest.raises(UserError, match="No weight up to layer 0 trains"):
        gradients(model, sequences)


def test_weights_above_the_layer_get_a_gradient_of_zero(sequences):
    found = gradients(tiny_model("phi"), sequences)
    above = [name for name in found if ".layers.1." in name or "lm_head" in name]
    below = [name for name in found if ".layers.0." in name]
    assert above and not any(found[name].any() for name in above)
    assert any(found[name].any() for name in below)


def test_layers_that_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match="rmu: layers: expected numbers of 0 to 1, got 7"):
        make_trainer(tmp_path, objective="rmu+gd")
    with pytest.raises(UserError, match=r"embed_diff: layers: .* such as \[7\], got 1"):
        make_trainer(tmp_path, objective="ga+embed_diff", retain_parameters={"layers": 1})


def test_a_disabled_adapter_and_a_frozen_copy_are_the_same_reference(tmp_path):
    runs = {
        kind: trained(tmp_path / kind, tiny_model(lora=True), reference=kind, **RMU)
        for kind in ("adapter", "frozen", "auto")
    }
    assert history(runs["auto"], "retain/loss")[-1] > 0
    for kind in ("frozen", "auto"):
        assert history(runs[kind], "retain/loss") == history(runs["adapter"], "retain/loss")
        assert torch.equal(weights(runs[kind].model), weights(runs["adapter"].model))


def test_hidden_states_cannot_be_precomputed(tmp_path):
    trainer = make_trainer(tmp_path, reference="precomputed", **RMU)
    with pytest.raises(UserError, match=r"or hidden states\. Use reference: auto"):
        trainer.train()


def test_steering_moves_hidden_states_towards_the_vector_and_keeps_the_others(tmp_path):
    trainer = trained(
        tmp_path,
        **RMU,
        max_steps=60,
        forget_weight=10.0,
        schedule="joint",
        learning_rate=1e-3,
    )
    steered, kept = history(trainer, "forget/loss"), history(trainer, "retain/loss")
    assert steered[-1] < 0.7 * steered[0]
    assert kept[-1] < max(kept)


def test_rerouting_turns_hidden_states_away_from_where_they_were(tmp_path):
    trainer = trained(
        tmp_path,
        objective="rr+embed_l2",
        forget_parameters=FIRST,
        retain_parameters=FIRST,
        max_steps=40,
        schedule="joint",
        learning_rate=3e-3,
    )
    similarity = history(trainer, "forget/loss")
    assert similarity[0] == pytest.approx(1, abs=1e-5)
    assert similarity[-1] < 0.9
