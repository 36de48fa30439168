"""A merged adapter: weights that changed, logits and scores that did not, on the disk, too."""

import json
from pathlib import Path

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model, train_adapter_a_little
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from unlearn_llm import merge as module
from unlearn_llm.checkpoints import fault
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.four_bit import FourBit, dequantized, merged
from unlearn_llm.merge import MOST, logits, merge, weight_sums
from unlearn_llm.models import LoraSettings, ModelSettings, add_lora, load_model

EXACT = FourBit(compute_dtype="float32")


@pytest.fixture(scope="module", params=["llama", "phi"])
def models(request, tmp_path_factory):
    """A folder with a base and an adapter of it that was trained."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "base")
    save(add_lora(load(folder / "base"), LoraSettings(r=4)), folder / "adapter")
    return folder


def save(model, folder, train=True):
    if train:
        train_adapter_a_little(model)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **settings):
    return load_model(ModelSettings(path=str(folder), **settings)).eval()


def settings_of(folder, **settings):
    return ModelSettings(path=str(folder), **settings)


@pytest.mark.parametrize("four_bit", [None, EXACT, FourBit()], ids=["full", "exact", "bfloat16"])
def test_the_merged_model_is_the_adapter_on_its_base(models, tmp_path, four_bit):
    adapter = load(models / "adapter", four_bit=four_bit and EXACT)
    done = merge(settings_of(models / "adapter", four_bit=four_bit), tmp_path / "out")
    assert 0 <= done.in_memory <= MOST and 0 <= done.reloaded <= MOST
    ours = load(tmp_path / "out")
    # Sums of products in another order: float32 rounding only.
    torch.testing.assert_close(logits(ours), logits(adapter), rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert not hasattr(ours.config, "quantization_config")
    with adapter.disable_adapter():
        assert float((logits(adapter) - logits(ours)).abs().max()) > 10 * MOST


@pytest.mark.parametrize("four_bit", [None, EXACT], ids=["full", "4 bits"])
def test_weights_are_base_plus_b_times_a(models, tmp_path, four_bit):
    merge(settings_of(models / "adapter", four_bit=four_bit), tmp_path / "out")
    base = load(models / "base", four_bit=four_bit)
    base = dict((dequantized(base) if four_bit else base).named_parameters())
    adapter = {
        name.removeprefix("base_model.model."): weight
        for name, weight in load(models / "adapter").named_parameters()
    }
    changed = set()
    for name, weight in load(tmp_path / "out").named_parameters():
        layer = name.removesuffix(".weight")
        expected = base[name]
        if f"{layer}.lora_A.default.weight" in adapter:
            changed.add(name)
            b, a = (adapter[f"{layer}.lora_{part}.default.weight"] for part in "BA")
            expected = expected + 16 / 4 * b @ a  # alpha / r
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    note = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert set(note["changed"]) == changed and len(changed) >= 12
    sums = weight_sums(load(tmp_path / "out"))
    for name, (before, after) in note["changed"].items():
        assert before != after == sums[name]
    assert note["base"] == "base" and str(models) not in json.dumps(note)
    assert fault(tmp_path / "out") is None
    assert not list(tmp_path.glob(".merge-*"))


@pytest.mark.slow
def test_scores_are_the_adapters(models, tmp_path):
    merge(settings_of(models / "adapter", four_bit=EXACT), tmp_path / "out")
    suite = Suite.load("synthetic", limit=3, max_new_tokens=4)
    encoder = Encoder(small_tokenizer(), "plain", 128)
    ours, theirs = (
        evaluate(suite, model, encoder, None).scores
        for model in (load(tmp_path / "out"), load(models / "adapter", four_bit=EXACT))
    )
    for name, score in theirs.items():
        if score.value is not None:
            assert ours[name].value == pytest.approx(score.value, abs=1e-4), name


def test_an_adapter_under_attack_is_merged_into_the_weights_it_was_trained_on(models):
    model = load(models / "adapter", four_bit=EXACT)
    wanted = logits(model)
    plain = merged(model)
    assert not any(p.dtype == torch.uint8 for p in plain.parameters())
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)


def other_adapter(models, folder, **settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **settings)
    model = get_peft_model(load(models / "base"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return save(model, folder, train=False)


@pytest.mark.parametrize("four_bit", [None, EXACT], ids=["full", "4 bits"])
@pytest.mark.parametrize("extra", [{"use_dora": True}, {"modules_to_save": ["final_layernorm"]}])
def test_other_kinds_of_adapters_are_merged_or_refused(models, tmp_path, extra, four_bit):
    if "modules_to_save" in extra and models.name.startswith("llama"):
        extra = {"modules_to_save": ["norm"]}
    folder = other_adapter(models, tmp_path / "other", target_modules=["q_proj"], **extra)
    done = merge(settings_of(folder, four_bit=four_bit), tmp_path / "out")
    assert any(name.endswith(("layernorm.weight", "norm.weight")) for name in done.changed) == (
        "modules_to_save" in extra
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft says that it is risky, three times
def test_a_head_that_is_tied_to_the_embeddings_is_no_silent_mistake(models, tmp_path):
    folder = other_adapter(models, tmp_path / "other", target_modules=["q_proj", "lm_head"])
    if models.name.startswith("phi"):  # its head has a weight of its own
        assert "lm_head.weight" in merge(settings_of(folder), tmp_path / "out").changed
    else:
        refused(settings_of(folder), tmp_path / "out", "does not compute what the adapter")


def refused(settings, output, words):
    with pytest.raises(UserError, match=words):
        merge(settings, output)
    assert not output.exists() and not list(output.parent.glob(".merge-*"))


def test_an_adapter_that_changes_nothing_is_refused(models, tmp_path):
    fresh = save(add_lora(load(models / "base"), LoraSettings()), tmp_path / "fresh", train=False)
    refused(settings_of(fresh), tmp_path / "out", "changes no weight of its base")


def test_a_merge_that_peft_got_wrong_is_refused(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(module, "MOST", -1.0)
        refused(settings_of(models / "adapter"), tmp_path / "out", "does not compute what the ada")


def test_a_file_that_is_not_what_was_written_is_refused(models, tmp_path, monkeypatch):
    def load_other(settings):
        model = load_model(settings)
        if settings.path.endswith("out"):
            with torch.no_grad():
                model.get_input_embeddings().weight[0, 0] += 1e-6
        return model

    monkeypatch.setattr(module, "load_model", load_other)
    refused(settings_of(models / "adapter"), tmp_path / "out", "are not those that were written")


def test_what_cannot_be_merged_is_one_line(models, tmp_path):
    refused(settings_of(models / "base"), tmp_path / "out", "is no adapter: there is nothing to")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = save(get_peft_model(load(models / "base"), config), tmp_path / "prompts", False)
    refused(settings_of(prompts), tmp_path / "out", "adds prompts")
    Path(tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists; give a new folder"):
        merge(settings_of(models / "adapter"), tmp_path / "there")
