"""Task arithmetic on folders: against arithmetic on models in memory."""

import json
import sys
import weakref

import pytest
import torch
from models_for_tests import small_tokenizer, synthetic_pairs, tiny_model, train_adapter_a_little
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unlearn_llm import cli, negate
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.finetune import FinetuneConfig, finetune


def save(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def moved(model, seed=3):
    """The model, each weight a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_moved_away_from_its_fine_tuned_self(tmp_path, alpha, dtype):
    base, tuned = tiny_model().to(dtype), moved(tiny_model().to(dtype))
    # Files are cut in other places; the tied head is in neither.
    save(base, tmp_path / "base", max_shard_size="20KB")
    save(tuned, tmp_path / "tuned", max_shard_size="45KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    small_tokenizer().save_pretrained(tmp_path / "base")
    negate.negate(tmp_path / "base", tmp_path / "tuned", tmp_path / "made" / "out", alpha)
    out = tmp_path / "made" / "out"
    made, theirs = load(out).state_dict(), tuned.state_dict()
    for name, before in base.state_dict().items():
        assert made[name].dtype == dtype
        exact = before.double() - alpha * (theirs[name].double() - before.double())
        # float32 sums, then one rounding; a product in bfloat16 would be off by more.
        assert (
            (made[name].double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7
        ).all()
        if alpha == 0:
            assert torch.equal(made[name], before)
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "task_arithmetic.json").read_text())["alpha"] == alpha
    assert not list((tmp_path / "made").glob(".*"))


def test_one_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    base = save(tiny_model(), tmp_path / "base", max_shard_size="20KB")
    tuned = save(moved(tiny_model()), tmp_path / "tuned")
    entries = sum(parameter.numel() for parameter in tiny_model().parameters())
    alive, most = weakref.WeakSet(), []
    save_file = negate.save_file

    def watched(tensors, *others, **keywords):
        alive.update(tensors.values())
        most.append(sum(tensor.numel() for tensor in alive))
        save_file(tensors, *others, **keywords)

    monkeypatch.setattr(negate, "save_file", watched)
    negate.negate(base, tuned, tmp_path / "out")
    assert len(most) > 2
    assert max(most) <= entries * 0.9  # the embedding is one file


def test_an_adapter_is_negated_by_its_b_matrices(tmp_path):
    base = save(tiny_model(), tmp_path / "base")
    model = train_adapter_a_little(tiny_model(lora=True))
    model.peft_config["default"].base_model_name_or_path = str(base)
    save(model, tmp_path / "adapter")
    negate.negate(base, tmp_path / "adapter", tmp_path / "out", alpha=0.5)
    before = load(base).state_dict()
    tuned, made = (
        PeftModel.from_pretrained(load(base), tmp_path / name).merge_and_unload().state_dict()
        for name in ("adapter", "out")
    )
    changed = [name for name in before if not torch.equal(before[name], tuned[name])]
    assert len(changed) == 14  # seven matrices of each layer
    for name in before:
        expected = before[name] - 0.5 * (tuned[name] - before[name])
        torch.testing.assert_close(made[name], expected, rtol=0, atol=1e-6)


def test_what_was_learnt_last_is_forgotten(tmp_path, monkeypatch):
    tokenizer, forget = small_tokenizer(), synthetic_pairs("forget10")
    encoder = Encoder(tokenizer, "plain")
    model, ids = tiny_model(), encoder.pairs([forget[0].question], [forget[0].answer])[0].ids
    args = FinetuneConfig(
        str(tmp_path / "run"), use_cpu=True, max_steps=20, learning_rate=1e-3, disable_tqdm=True
    )
    save(model, tmp_path / "base")
    finetune(model, tokenizer, forget, encoder, args)
    save(model, tmp_path / "tuned")
    arguments = ["negate", *(str(tmp_path / name) for name in ("base", "tuned", "out"))]
    monkeypatch.setattr(sys, "argv", ["unlearn", *arguments, "--alpha", "0.8"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    losses = {}
    for name in ("base", "tuned", "out"):
        batch = torch.tensor([ids])
        losses[name] = load(tmp_path / name)(input_ids=batch, labels=batch).loss.item()
    assert losses["tuned"] < losses["base"] - 0.1
    assert losses["out"] > losses["base"] + 0.03


def test_nothing_stays_of_what_fails_half_way(tmp_path, monkeypatch):
    base, tuned = (save(tiny_model(seed=s), tmp_path / str(s)) for s in (0, 1))

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(negate, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        negate.negate(base, tuned, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_folders_that_do_not_belong_together_are_refused(tmp_path):
    base = save(tiny_model(), tmp_path / "base")
    phi = save(tiny_model("phi"), tmp_path / "phi")
    with pytest.raises(UserError, match="not the same model: only one of them holds"):
        negate.negate(base, phi, tmp_path / "out")
    wide = tiny_model()
    wide.resize_token_embeddings(700)
    with pytest.raises(UserError, match=r"embed_tokens.weight has the shapes \[600, 32\]"):
        negate.negate(base, save(wide, tmp_path / "wide"), tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no .safetensors"):
        negate.negate(base, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UserError, match="exists; give a new folder"):
        negate.negate(base, base, phi)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="cannot be read"):
        negate.negate(base, tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_cannot_be_negated_are_refused(tmp_path):
    base = save(tiny_model(), tmp_path / "base")
    model = tiny_model(lora=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    adapter = save(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is an adapter of .*base, not of"):
        negate.negate(tmp_path / "other", adapter, tmp_path / "out")
    file = adapter / "adapter_model.safetensors"
    tensors = {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    negate.save_file(tensors, file)
    with pytest.raises(UserError, match=r"lm_head.weight is no A or B matrix"):
        negate.negate(base, adapter, tmp_path / "out")
