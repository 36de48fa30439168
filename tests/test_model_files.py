"""Models that are whole pass; those that are not are in bad_inputs/models.py."""

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model, train_adapter_a_little
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_llm.model_files import check_model
from unlearn_llm.models import LoraSettings, ModelSettings, load_model


def saved(model, folder, **keywords) -> ModelSettings:
    model.save_pretrained(folder, **keywords)
    return ModelSettings(path=str(folder))


def of_family(name: str):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        name, **sizes, intermediate_size=32, num_key_value_heads=2, head_dim=8, vocab_size=600
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3", "gpt_neox", "mistral", "olmo2"])
def test_what_save_pretrained_writes_passes_and_loads(family, tmp_path):
    settings = saved(of_family(family), tmp_path)
    check_model(settings, small_tokenizer())
    load_model(settings)


def test_mixture_of_experts_is_not_refused_for_names_that_differ_in_files(tmp_path):
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=600,
    )
    settings = saved(AutoModelForCausalLM.from_config(config), tmp_path)
    check_model(settings, small_tokenizer())
    load_model(settings)


def test_shards_and_bfloat16_pass(tmp_path):
    settings = saved(tiny_model().to(torch.bfloat16), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_model(settings, small_tokenizer())
    load_model(settings)


def test_an_adapter_with_its_base_passes_and_a_fresh_one_is_tried_on_no_weights(tmp_path):
    base = saved(tiny_model(), tmp_path / "base")
    check_model(ModelSettings(path=base.path, lora=LoraSettings(r=2)), small_tokenizer())
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    settings = saved(train_adapter_a_little(model), tmp_path / "tuned")
    check_model(settings, small_tokenizer())
    load_model(settings)


def test_what_is_on_the_hub_is_left_to_loading():
    check_model(ModelSettings(path="nobody/nothing"), small_tokenizer())


def test_no_weight_is_read(tmp_path, monkeypatch):
    settings = saved(tiny_model(), tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    before = torch.get_rng_state()
    check_model(settings, small_tokenizer())
    assert torch.equal(before, torch.get_rng_state())
