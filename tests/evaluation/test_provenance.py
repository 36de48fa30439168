"""Fingerprints: whatever changes what a model computes or how it reads changes them."""

import copy

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model, train_adapter_a_little

from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.provenance import (
    describe_model,
    fingerprint,
    tokenizer_fingerprint,
)


def test_equal_models_have_equal_fingerprints(tmp_path):
    before = fingerprint(tiny_model())
    assert before == fingerprint(tiny_model()) and len(before) == 16
    tiny_model().save_pretrained(tmp_path)
    loaded = type(tiny_model()).from_pretrained(tmp_path)  # from elsewhere, but the same
    assert fingerprint(loaded) == before


def test_every_single_weight_counts():
    model = tiny_model()
    before = {fingerprint(model)}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        place = len(flat) * 2 // 3 + 1
        value = flat[place].item()
        flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))  # the last bit
        assert fingerprint(model) not in before
        flat[place] = value
    assert fingerprint(model) in before


def test_buffers_count():
    model = tiny_model()
    model.register_buffer("scale", torch.ones(1))
    before = fingerprint(model)
    model.scale += 1
    assert fingerprint(model) != before


def test_another_precision_is_another_model():
    model = tiny_model()
    assert fingerprint(copy.deepcopy(model).bfloat16()) != fingerprint(model)


def test_quantised_weights_are_read_in_their_own_form():
    """A weight that only pretends to be a float, as torchao's do: its parts are hashed."""

    class Halves(torch.Tensor):
        @staticmethod
        def __new__(cls, low, high):
            return torch.Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32)

        def __init__(self, low, high):
            self.low, self.high = low, high

        def __tensor_flatten__(self):
            return ["low", "high"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return args[0]

    def model(high):
        made = tiny_model()
        made.state_dict = lambda: {"weight": Halves(torch.zeros(2), torch.full((2,), high))}
        return made

    assert fingerprint(model(1.0)) == fingerprint(model(1.0)) != fingerprint(model(2.0))


def test_settings_count_that_no_weight_shows():
    model = tiny_model()
    before = fingerprint(model)
    model.config.rms_norm_eps *= 2
    assert fingerprint(model) != before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_counts_its_weights_and_its_scale():
    model = tiny_model(lora=True)
    fresh = fingerprint(model)
    trained = fingerprint(train_adapter_a_little(model))
    model.peft_config["default"].lora_alpha *= 2
    assert len({fresh, trained, fingerprint(model), fingerprint(tiny_model())}) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["zzz"]),
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<s>"),
    ],
)
def test_a_changed_tokenizer_is_another(change):
    tokenizer = copy.deepcopy(small_tokenizer())
    before = tokenizer_fingerprint(tokenizer)
    assert before == tokenizer_fingerprint(small_tokenizer())
    change(tokenizer)
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_description_says_how_a_model_is_asked():
    encoder = Encoder(small_tokenizer(), "phi", max_length=99, truncate=True)
    described = describe_model(tiny_model(), encoder)
    assert described["template"] == "phi" and described["max_length"] == 99
    assert described["truncate"] and described["tokenizer"] == tokenizer_fingerprint(
        encoder.tokenizer
    )
