"""Adapters that share a base in memory against each model loaded by itself."""

import copy
from dataclasses import replace

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model, train_adapter_a_little
from peft import LoraConfig, get_peft_model

from unlearn_llm import shared_base
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.provenance import fingerprint
from unlearn_llm.models import LoraSettings, ModelSettings, NewModel, load_model, new_model
from unlearn_llm.shared_base import SharedBase

ADAPTERS = {
    "one": {},
    "two": {"r": 2, "use_dora": True},
    "biases": {"bias": "all"},  # changes the base itself
    "tokens": {"trainable_token_indices": [3, 4]},
    "whole_layer": {"modules_to_save": ["norm"]},
    "pissa": {"init_lora_weights": "pissa"},  # as well
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Phi (it has biases) and adapters of it, all of them changed as by training."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("phi").save_pretrained(folder / "base")
    tiny_model("llama", seed=3).save_pretrained(folder / "other")
    narrow = NewModel(family="phi", hidden_size=16, layers=2, heads=2)
    new_model(narrow, small_tokenizer()).save_pretrained(folder / "narrow")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        base = load_model(ModelSettings(path=str(folder / "base")))
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings)
        model = train_adapter_a_little(get_peft_model(base, config), seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01
        model.save_pretrained(folder / name)
        assert (folder / name / "adapter_config.json").is_file()
    for path in folder.iterdir():
        small_tokenizer().save_pretrained(path)
    return folder


def logits(model):
    ids = torch.arange(40).reshape(2, 20) * 7
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def loads(monkeypatch):
    """The folders that weights are loaded from, besides adapters."""
    seen = []

    def load(settings):
        seen.append(str(settings.path).rpartition("/")[2])
        return load_model(settings)

    monkeypatch.setattr(shared_base, "load_model", load)
    return seen


@pytest.mark.parametrize(
    ("names", "loaded"),
    [
        (["one", "two", "one", "base", "tokens", "whole_layer"], ["base"]),
        (["base", "one", "other", "two"], ["base", "other", "base"]),
        # What these leave behind is not the base any more, so it is loaded anew.
        (["biases", "one", "whole_layer", "one", "pissa", "base"], ["base"] * 4),
    ],
)
def test_a_shared_base_gives_the_models_bitwise(models, loads, names, loaded):
    shared = SharedBase()
    for name in names:
        settings = ModelSettings(path=str(models / name))
        alone, ours = load_model(settings), shared.load(settings)
        assert torch.equal(logits(alone), logits(ours)), name
        assert fingerprint(alone) == fingerprint(ours), name
    assert loads == loaded


def test_a_larger_tokenizer_gets_a_model_of_its_own(models, loads, tmp_path):
    load_model(ModelSettings(path=str(models / "one"))).save_pretrained(tmp_path / "wide")
    larger = copy.deepcopy(small_tokenizer())
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path / "wide")
    shared = SharedBase()
    wide = shared.load(ModelSettings(path=str(tmp_path / "wide")))
    assert wide.get_input_embeddings().weight.shape[0] == len(larger)
    narrow = shared.load(ModelSettings(path=str(models / "one")))
    assert narrow.get_input_embeddings().weight.shape[0] == len(larger) - 1


def test_an_adapter_takes_no_second_one(models):
    settings = ModelSettings(path=str(models / "one"), lora=LoraSettings())
    with pytest.raises(UserError, match="is an adapter already"):
        SharedBase().load(settings)


def test_a_named_adapter_is_put_on_a_named_base(models, tmp_path, caplog):
    settings = ModelSettings(path=str(models / "base"), adapter=str(models / "one"))
    expected = logits(load_model(ModelSettings(path=str(models / "one"))))
    assert torch.equal(logits(load_model(settings)), expected)
    assert torch.equal(logits(SharedBase().load(settings)), expected)
    assert not caplog.text
    tiny_model("phi").save_pretrained(tmp_path / "moved")
    moved = replace(settings, path=str(tmp_path / "moved"))
    assert torch.equal(logits(load_model(moved)), expected)
    assert f"was trained on {models / 'base'}, now it is on {tmp_path / 'moved'}" in caplog.text
    with pytest.raises(UserError, match="does not fit its base model"):
        load_model(replace(settings, path=str(models / "narrow")))
    with pytest.raises(UserError, match="is an adapter itself"):
        load_model(replace(settings, path=str(models / "two")))


def test_an_adapter_without_its_base_is_one_line(models, tmp_path):
    load_model(ModelSettings(path=str(models / "one"))).save_pretrained(tmp_path / "lost")
    file = tmp_path / "lost" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(models / "base"), "/nowhere/base"))
    with pytest.raises(UserError, match="there is no folder /nowhere/base"):
        SharedBase().load(ModelSettings(path=str(tmp_path / "lost")))
