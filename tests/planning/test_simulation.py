"""What is counted on fake tensors, against counting by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from unlearn_llm.models import LoraSettings, ModelSettings
from unlearn_llm.planning.contentless import contentless
from unlearn_llm.planning.live import Live
from unlearn_llm.planning.simulation import Passes, Shape, Side, simulate

ROWS, WIDTH, SCORED = 3, 20, 17
HIDDEN, INNER, HEADS, WORDS = 64, 192, 4, 1000
SHAPE = Shape(ROWS, WIDTH, SCORED)
FLOAT = 4


@pytest.fixture
def folder(tmp_path):
    def write(layers=2, family="llama", **settings):
        config = AutoConfig.for_model(
            family,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=64,
            **{"vocab_size": WORDS, "tie_word_embeddings": False, **settings},
        )
        where = tmp_path / f"{family}{layers}"
        config.save_pretrained(where)
        return str(where)

    return write


def cost(path, sides=None, how=None, lora=None, **settings):
    mode = FakeTensorMode()
    model = contentless(ModelSettings(path=path, lora=lora), mode, **settings)
    sides = sides or [Side({"original": SHAPE}, reference=False)]
    return simulate(model, mode, sides, how or Passes())


def test_live_counts_storages_until_they_are_freed():
    with FakeTensorMode():
        weight = torch.empty(8, 8, requires_grad=True)
        live = Live([weight])
        with live:
            inputs = torch.ones(4, 8)  # 128 bytes
            product = inputs @ weight  # 128
            view = product.view(-1)[3:]
            assert live.now == 256
            doubled = product * 2  # 128
            del product
            assert live.now == 384  # the view holds it
            del view
            assert (live.now, live.peak) == (256, 384)
            doubled.sum().backward()
    assert live.gradients == weight.numel() * FLOAT
    # Two matrix products: forward, and the gradient of the weight; 2 x 4 x 8 x 8 each.
    assert live.flops == 2 * 512


def test_a_mark_shows_the_peak_from_there_on():
    with FakeTensorMode():
        live = Live([])
        with live:
            first = torch.ones(100)
            del first
            kept = torch.ones(10)
            live.mark()
            second = torch.ones(20)
            del second
    assert live.above_mark() == 80
    assert kept.numel() == 10


def test_a_layer_of_llama_keeps_what_one_counts_by_hand(folder):
    states = ROWS * WIDTH * HIDDEN * FLOAT
    inner = ROWS * WIDTH * INNER * FLOAT
    norms = 2 * ROWS * WIDTH * FLOAT  # reciprocal roots
    # Two norms: input, normalised, scaled. Attention: query, key, value, output, sums, and the
    # mask in floats.
    attention = 4 * states + ROWS * WIDTH * HEADS * FLOAT + ROWS * WIDTH**2 * FLOAT
    # Gated unit: gate, its sigmoid product, up, and the product of both.
    by_hand = 2 * 3 * states + norms + attention + 4 * inner
    differ = cost(folder(4)).activations - cost(folder(2)).activations
    assert differ == 2 * by_hand


def test_a_checkpointed_layer_keeps_its_input_only(folder):
    costs = [cost(folder(layers), checkpointing=True) for layers in (2, 4)]
    assert costs[1].activations - costs[0].activations == 2 * ROWS * WIDTH * HIDDEN * FLOAT
    # And is computed a second time, but for its last product, which nothing keeps.
    plain = cost(folder(4))
    again = costs[1].flops - plain.flops
    head = 2 * SCORED * HIDDEN * WORDS
    last = 4 * 2 * ROWS * WIDTH * HIDDEN * INNER
    assert again == plain.forward - head - last


def test_gradients_and_operations_are_those_of_the_weights(folder):
    found = cost(folder())
    layers = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    products = 2 * ROWS * WIDTH * layers + 2 * SCORED * HIDDEN * WORDS
    attention = 2 * 2 * (2 * ROWS * WIDTH * WIDTH * HIDDEN)
    assert found.forward == products + attention
    # Backward: two products for each, and attention computes its scores again. Logits are few
    # enough to be kept.
    assert found.flops == 3 * products + attention + attention // 2 * 5


def test_gradients_of_an_earlier_micro_batch_stay(folder):
    once, again = cost(folder()), cost(folder(), how=Passes(accumulate=True))
    weights = 2 * WORDS * HIDDEN + 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN) + HIDDEN
    assert again.flops == once.flops
    assert again.activations == once.activations
    assert again.peak == again.without_gradients + weights * FLOAT


def test_lora_computes_no_gradient_of_the_weights(folder):
    whole, adapter = cost(folder()), cost(folder(), lora=LoraSettings(r=2))
    assert adapter.flops < 0.75 * whole.flops
    assert adapter.peak < whole.peak


def test_both_sides_of_a_joint_step_are_alive_together(folder):
    one = cost(folder())
    side = Side({"original": SHAPE}, reference=False)
    joint = cost(folder(), [side, side])
    apart = cost(folder(), [side, side], Passes(apart=True))
    assert joint.activations > 1.9 * one.activations
    assert apart.activations == pytest.approx(one.activations, rel=0.01)
    assert joint.flops == apart.flops == 2 * one.flops


def test_gradients_of_the_first_pass_stay_through_the_second(folder):
    long, short = (Side({"original": Shape(3, width, 9)}, reference=False) for width in (60, 20))
    weights = cost(folder(), [short], Passes(accumulate=True))
    gradients = weights.peak - weights.without_gradients
    alone = cost(folder(), [long]).peak
    assert cost(folder(), [short, long], Passes(apart=True)).peak == alone + gradients
    # The other way round the larger pass is done before there is anything to keep.
    assert cost(folder(), [long, short], Passes(apart=True)).peak < alone + gradients


def test_a_reference_is_one_more_forward_pass(folder):
    with_it = cost(folder(), [Side({"original": SHAPE}, reference=True)])
    without = cost(folder())
    assert with_it.forward == 2 * without.forward
    assert with_it.activations < 1.1 * without.activations


def test_answers_that_go_together_are_padded_to_the_longest(folder):
    shapes = {"original": Shape(2, 20, 8), "idk": Shape(2, 8, 8)}
    sides = [Side(shapes, reference=False)]
    apart, together = (cost(folder(), sides, Passes(together=t)) for t in (False, True))
    assert 1.3 < together.activations / apart.activations < 40 / 28 * 1.05


def test_fine_tuning_has_logits_of_all_positions(folder):
    found = cost(folder(), how=Passes(whole_logits=True))
    assert found.logits == ROWS * WIDTH * WORDS * FLOAT
    assert cost(folder()).logits < found.logits


@pytest.mark.parametrize("family", ["phi", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("bf16", [False, True])
def test_other_architectures_need_no_word_here(folder, family, bf16):
    settings = {"head_dim": HIDDEN // HEADS} if family in ("qwen3", "gemma2") else {}
    path = folder(family=family, pad_token_id=0, **settings)
    found = cost(path, how=Passes(bf16=bf16), bf16=bf16)
    assert found.peak > found.activations > 0


def test_two_gradients_of_a_tied_weight_are_added_in_place(folder):
    # Few tokens and a large weight, so that the end of the backward pass is the peak: the weight's
    # gradients from the head and from the embedding, and nothing else of that size.
    sides = [Side({"original": Shape(1, 4, 2)}, reference=False)]
    found = cost(folder(tie_word_embeddings=True, vocab_size=50_000), sides)
    of_weight = 50_000 * HIDDEN * FLOAT
    assert 2 * of_weight < found.peak < 2.2 * of_weight


def test_what_is_tied_is_one_weight(folder):
    mode = FakeTensorMode()
    tied = contentless(ModelSettings(path=folder(tie_word_embeddings=True)), mode)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
