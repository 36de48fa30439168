"""A base in 4 bits against the same weights written out: forward pass, gradients, reference."""

import re

import pytest
import torch
from accelerate import Accelerator
from models_for_tests import REFUSALS, small_tokenizer, synthetic_pairs, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

from unlearn_llm.dataset import Collator, EncodedRows
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.four_bit import FourBit, dequantized, four_bit_layers, in_float32
from unlearn_llm.models import LoraSettings, ModelSettings, add_lora, load_model
from unlearn_llm.reference import DisabledAdapter, Precomputed
from unlearn_llm.resources import RECIPES
from unlearn_llm.scoring import score

COLLATOR = Collator(pad_id=0)
EXACT = FourBit(compute_dtype="float32")


@pytest.fixture(scope="module", params=["llama", "phi"])
def base(request, tmp_path_factory):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return str(folder)


def load(base, four_bit=EXACT, **settings):
    torch.manual_seed(1)
    return load_model(ModelSettings(path=base, four_bit=four_bit, **settings))


def a_batch(numbers=(0, 1, 2)):
    encoder = Encoder(small_tokenizer(), "plain")
    rows = EncodedRows(synthetic_pairs("forget10"), encoder, ("original", "idk"), refusals=REFUSALS)
    samples = [rows[number] for number in numbers]
    batch = {a: COLLATOR.sequences([sample[a] for sample in samples]) for a in rows.encoded}
    return rows, batch


def gradients(model):
    _, batch = a_batch()
    model.train()
    model.zero_grad()
    (-score(model, batch)["original"].logp.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def evaluated(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20) * 7).logits


def test_the_linear_layers_are_in_four_bits_and_the_head_is_not(base):
    model = load(base)
    layers = four_bit_layers(model)
    assert len(layers) == sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - 1
    assert model.get_output_embeddings() not in layers
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_weights_are_those_that_bitsandbytes_rounds_to(base, quant_type):
    from bitsandbytes import functional

    plain = AutoModelForCausalLM.from_pretrained(base)
    four_bit = FourBit(quant_type=quant_type, double_quant=False, compute_dtype="float32")
    rounded = dict(dequantized(load(base, four_bit)).named_parameters())
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not plain.get_output_embeddings():
            codes, state = functional.quantize_4bit(
                module.weight.data, blocksize=64, quant_type=quant_type
            )
            expected = functional.dequantize_4bit(codes, state)
            assert torch.equal(rounded[f"{name}.weight"], expected), name
            assert not torch.equal(expected, module.weight)


def test_gradients_are_those_of_the_weights_written_out_even_after_an_evaluation(base):
    # dependencies.md 3: on a CPU with AVX512_BF16 an evaluation packs the weights, and most
    # gradients of the adapter are wrong or missing afterwards.
    plain = add_lora(dequantized(load(base)), LoraSettings(r=4))
    ours = add_lora(load(base), LoraSettings(r=4))
    assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(ours))
    ours.load_state_dict(
        {n: p for n, p in plain.state_dict().items() if "lora_" in n}, strict=False
    )
    torch.testing.assert_close(evaluated(ours), evaluated(plain))
    found, expected = gradients(ours), gradients(plain)
    assert found.keys() == expected.keys() and len(found) >= 24
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert sum(bool(gradient.any()) for gradient in found.values()) >= len(found) // 2


def test_the_disabled_adapter_gives_the_cached_log_probabilities(base):
    model = load(base, lora=LoraSettings(r=4))
    rows, batch = a_batch((5, 0, 3))
    cached = Precomputed.compute(model, {"forget": rows}, COLLATOR, 4, Accelerator(cpu=True))
    with torch.no_grad():  # as training would: only the adapter moves
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    disabled = DisabledAdapter(model)("forget", batch, "answer")
    moved = score(model, batch)
    for answer, expected in cached("forget", batch, "answer").items():
        # Other batches, other padding: float32 rounding only.
        torch.testing.assert_close(disabled[answer].token_logps, expected.token_logps)
        assert not torch.allclose(moved[answer].token_logps, expected.token_logps, atol=1e-3)


def test_a_model_loaded_in_bfloat16_computes_the_same_when_it_is_written_out(base):
    model = load(base, FourBit(), dtype="bfloat16")
    in_float32(model)
    four_bit = evaluated(model)
    assert four_bit.dtype == torch.float32
    torch.testing.assert_close(evaluated(dequantized(model)), four_bit)


def test_without_bitsandbytes_it_is_named(base, monkeypatch):
    from unlearn_llm import four_bit

    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'unlearn_llm\[qlora\]'"):
        load(base)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-2-7b", LlamaConfig()),  # the defaults are the first 7B model's
        (
            "llama-3.2-1b",
            LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=64,
                tie_word_embeddings=True,
            ),
        ),
        ("phi-1.5", PhiConfig()),
    ],
)
def test_the_memory_note_of_the_published_sizes_adds_up(name, config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    in_four_bits = sum(layer.weight.numel() for layer in layers)
    others = sum(p.numel() for p in model.parameters()) - in_four_bits
    adapter = sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    # Half a byte, a byte of scale per 64 weights, 4 bytes per 256 scales.
    parts = in_four_bits * (1 / 2 + 1 / 64 + 4 / 64 / 256), others * 2, adapter * (4 + 4 + 6.1)
    text = (RECIPES / "tofu" / "qlora.yaml").read_text(encoding="utf-8")
    expected = (
        f"{name} {in_four_bits / 1e9:.3f}e9 in 4 bits {parts[0] / 1e9:.2f}, the rest "
        f"{parts[1] / 1e9:.2f}, adapter ({adapter / 1e6:.1f}e6) {parts[2] / 1e9:.2f}: "
        f"{sum(parts) / 1e9:.1f} GB"
    )
    assert expected in re.sub(r"[ #\n]+", " ", text)
