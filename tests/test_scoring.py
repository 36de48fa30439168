import copy
import math

import pytest
import torch
from models_for_tests import REFUSALS, small_tokenizer, synthetic_pairs, tiny_model
from tensor_watch import CountProducts, MadeLike
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_llm import scoring, vocabulary_chunks
from unlearn_llm.dataset import Collator, EncodedRows
from unlearn_llm.encode import Encoder
from unlearn_llm.losses.retain import kl
from unlearn_llm.models import LoraSettings, add_lora
from unlearn_llm.objective import FORGET_LOSSES
from unlearn_llm.scoring import (
    PLAIN_HEADS,
    ChunkedDistribution,
    Head,
    hidden_states_for_logits,
    score,
)

VOCABULARY = 600


@pytest.fixture(scope="module")
def sequences():
    """Four rows with two answers of unequal length, and so of unequal width."""
    rows = EncodedRows(
        synthetic_pairs("forget10")[:4],
        Encoder(small_tokenizer(), "plain"),
        ("original", "idk"),
        refusals=REFUSALS,
    )
    collate = Collator(pad_id=0).sequences
    return {
        answer: collate([rows[row][answer] for row in range(4)]) for answer in ("original", "idk")
    }


@pytest.fixture
def small_chunks(monkeypatch):
    # Three positions at a time, or of all positions some columns.
    for module in (scoring, vocabulary_chunks):
        monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * VOCABULARY)


def full_logps(model, part, positions="answer"):
    """The same from the model's own full logits, one sequence at a time, without padding."""
    result = torch.zeros(part["labels"].shape[0], part["labels"].shape[1] - 1)
    for row in range(len(result)):
        length = int(part["attention_mask"][row].sum())
        ids = part["input_ids"][row : row + 1, :length]
        logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
        for t in range(length - 1):
            first = part["labels"][row, t] == -100 and positions == "answer_after_first"
            if positions == "attended" or (part["labels"][row, t + 1] != -100 and not first):
                result[row, t] = logps[t, ids[0, t + 1]]
    return result


def lora_on_the_head(seed=0):
    model = add_lora(tiny_model("phi"), LoraSettings(target_modules=["q_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "phi": lambda: tiny_model("phi"),
    "lora": lambda: tiny_model("llama", lora=True),
    "lora on the head": lora_on_the_head,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("positions", ["answer", "answer_after_first", "attended"])
def test_log_probabilities_are_those_of_full_logits(sequences, small_chunks, make, positions):
    model = make()
    with torch.no_grad():
        for answer, scored in score(model, sequences, positions).items():
            # float32, sums of 600 terms: 1e-5 absolute on values of about -6.
            expected = full_logps(model, sequences[answer], positions)
            width = expected.shape[1]
            torch.testing.assert_close(scored.token_logps, expected, rtol=1e-5, atol=2e-5)
            assert scored.mask.shape == (4, width)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradients_are_those_of_full_logits(sequences, small_chunks, make):
    model = make()
    full = copy.deepcopy(model)
    scored = score(model, sequences)
    (scored["original"].logp.sum() - 2 * scored["idk"].logp.sum()).backward()
    expected = {answer: full_logps(full, sequences[answer]) for answer in sequences}
    (expected["original"].sum() - 2 * expected["idk"].sum()).backward()
    compared = 0
    for (name, ours), theirs in zip(model.named_parameters(), full.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * scale)
            compared += 1
    assert compared >= 6


def test_the_size_of_chunks_changes_nothing(sequences, monkeypatch):
    model = tiny_model("phi")
    found = []
    for rows in (1, 7, 10_000):
        for module in (scoring, vocabulary_chunks):
            monkeypatch.setattr(module, "CHUNK_BYTES", rows * 4 * VOCABULARY)
        found.append(score(model, sequences)["original"].logp)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_answers_scored_together_are_scored_as_alone(sequences, monkeypatch, device):
    if device == "gpu":  # one forward pass for all answers
        monkeypatch.setattr(scoring, "_forward_passes", lambda sequences: [list(sequences)])
    model = tiny_model()
    together = score(model, sequences)
    for answer, part in sequences.items():
        alone = score(model, {answer: part})[answer]
        torch.testing.assert_close(together[answer].token_logps, alone.token_logps)
        assert torch.equal(together[answer].mask, alone.mask)


def test_answer_positions_are_the_labelled_ones(sequences):
    scored = score(tiny_model(), sequences)["idk"]
    labels = sequences["idk"]["labels"][:, 1:]
    assert torch.equal(scored.mask, labels != -100)
    assert torch.equal(scored.targets[scored.mask], labels[labels != -100])
    assert scored.length.tolist() == (labels != -100).sum(1).tolist()
    assert not scored.token_logps[~scored.mask].any()


def test_attended_positions_predict_every_real_token(sequences):
    scored = score(tiny_model(), sequences, "attended")["idk"]
    lengths = sequences["idk"]["attention_mask"].sum(1)
    assert scored.length.tolist() == (lengths - 1).tolist()


def test_kl_over_chunks_is_that_of_full_logits(sequences, small_chunks):
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    part = {"original": sequences["original"]}
    with torch.no_grad():
        theirs = score(reference, part, "attended")
    ours = kl(score(policy, part, "attended"), theirs)
    inputs = {key: part["original"][key] for key in ("input_ids", "attention_mask")}
    p, q = (model(**inputs).logits[:, :-1].log_softmax(-1) for model in (policy, reference))
    divergence = (q.exp() * (q - p)).sum(-1) * inputs["attention_mask"][:, 1:]
    torch.testing.assert_close(ours, divergence.sum(1), rtol=1e-4, atol=1e-5)


# Heads that are more than a weight and a bias are asked themselves.


class OddHead(torch.nn.Linear):
    """Stands for Linear4bit and the like: what its weight holds is its own business."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Doubled(torch.Tensor):
    """Stands for a sharded weight: a subclass of Tensor."""


def give_head(model, how):
    head = model.lm_head
    if how == "subclass":
        model.lm_head = OddHead(32, VOCABULARY)
        model.lm_head.load_state_dict(head.state_dict())
    elif how == "forward of its own":
        head.forward = lambda hidden: 2 * torch.nn.functional.linear(hidden, head.weight, head.bias)
    else:
        head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(Doubled))
    return model


HEADS = ["subclass", "forward of its own", "subclass of its weight"]


@pytest.mark.parametrize("how", HEADS)
def test_an_odd_head_is_asked_itself(sequences, small_chunks, how):
    model = give_head(tiny_model("phi"), how)
    with hidden_states_for_logits(model) as head:
        assert head.linear is None
    part = {"original": sequences["original"]}
    with torch.no_grad():
        found = score(model, part)["original"].token_logps
        expected = full_logps(model, part["original"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_a_plain_head_is_not_asked(sequences):
    with hidden_states_for_logits(tiny_model("phi")) as head:
        assert head.linear is not None


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_what_chunks_of_the_vocabulary_give_is_what_whole_distributions_give(
    sequences, small_chunks, family
):
    policy, reference = tiny_model(family, seed=0), tiny_model(family, seed=1)
    with torch.no_grad():
        theirs = score(reference, sequences)["original"].distribution
    scored = score(policy, sequences)["original"]
    weights = list(policy.get_output_embeddings().parameters())

    def ask(distribution, other):
        return [
            distribution.token_logps(),
            distribution.divergence_from_uniform(),
            distribution.kl_from(other),
        ]

    def whole(distribution):
        head = Head(distribution.head.apply, distribution.vocabulary)
        return ChunkedDistribution(distribution.hidden, distribution.targets, head)

    ours = ask(scored.distribution, theirs)
    expected = ask(whole(scored.distribution), whole(theirs))
    for value, expected_value in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
        grads, expected_grads = (
            torch.autograd.grad(v.sum(), weights, retain_graph=True)
            for v in (value, expected_value)
        )
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            scale = float(expected_grad.abs().max())
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * scale)


def test_log_probabilities_and_divergences_of_all_answers_are_one_product(sequences):
    scored = score(tiny_model("phi"), sequences)
    with CountProducts() as counted:
        for answer in scored.values():
            answer.logp.sum()
            answer.distribution.divergence_from_uniform().sum()
    assert counted.products == 1


def test_two_answers_make_one_gradient_of_the_head(sequences):
    # Two, to be added up, would double the peak of a large vocabulary.
    model = tiny_model("phi")
    scored = score(model, sequences)
    given = [model.lm_head.weight]
    margin = (scored["original"].logp - scored["idk"].logp).sum()
    with MadeLike(model.lm_head.weight) as made:
        torch.autograd.grad(margin, given)
    assert made.count == 1


def test_distributions_over_other_vocabularies_are_not_compared(sequences):
    ours = score(tiny_model("phi"), sequences)["original"].distribution
    other = torch.nn.Linear(32, VOCABULARY + 1)
    head = Head(other.forward, VOCABULARY + 1, other)
    theirs = ChunkedDistribution(ours.hidden.detach(), ours.targets, head)
    with pytest.raises(RuntimeError, match="must match the size"):
        ours.kl_from(theirs)


# Families: whether the head alone makes the logits.

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
NEEDS_FULL_LOGITS = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.1},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("family", [*sorted(PLAIN_HEADS), *NEEDS_FULL_LOGITS])
def test_every_family_is_scored_as_its_own_logits_say(family):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    size = {**GPT2, **special} if family == "gpt2" else TINY
    config = AutoConfig.for_model(family, **size, **NEEDS_FULL_LOGITS.get(family, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # far from uniform, so that a forgotten scale or cap shows
    ids = torch.randint(3, 97, (2, 9))
    part = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        scored = score(model, {"original": part})["original"]
        logps = model(input_ids=ids, attention_mask=part["attention_mask"]).logits.log_softmax(-1)
    expected = logps[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(scored.token_logps, expected, rtol=1e-4, atol=1e-4)


# The head is borrowed and given back.


def test_the_model_gives_logits_again_afterwards(sequences):
    model = tiny_model("phi")
    ids = sequences["idk"]["input_ids"]
    before = model(input_ids=ids).logits
    score(model, sequences)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_head_is_given_back_when_the_forward_pass_fails():
    model = tiny_model("phi")
    with pytest.raises(RuntimeError, match="out of memory"), hidden_states_for_logits(model):
        raise RuntimeError("out of memory")
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY)


# Memory.


class LargestVocabularyTensor(TorchDispatchMode):
    """Records the most rows of vocabulary width that any one tensor had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,):
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_no_tensor_of_all_positions_by_vocabulary_is_ever_made(sequences, small_chunks, family):
    model = tiny_model(family)
    n_scored = int((sequences["original"]["labels"] != -100).sum())
    assert n_scored >= 50
    with LargestVocabularyTensor() as largest:
        score(model, sequences)["original"].logp.sum().backward()
    # The gradient of the head's weight is (vocabulary, hidden) and computed from its transpose.
    assert largest.rows <= max(3, model.config.hidden_size)


@pytest.mark.parametrize("name", ["undial", "ceu", "pdu"])
def test_losses_over_distributions_make_a_chunk_at_a_time(sequences, small_chunks, name):
    model, reference = tiny_model("phi"), tiny_model("phi", seed=1)
    loss, original = FORGET_LOSSES[name], {"original": sequences["original"]}
    with LargestVocabularyTensor() as largest:
        with torch.no_grad():
            frozen = score(reference, original, loss.positions)
        loss(score(model, original, loss.positions), frozen).sum().backward()
    assert largest.rows <= max(3, model.config.hidden_size)


def test_only_hidden_states_are_kept_for_the_backward_pass(sequences, small_chunks):
    model = tiny_model("phi")
    scored = score(model, sequences)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scored["original"].logp.sum()
    parameters = {p.data_ptr() for p in model.parameters()}
    n_bytes = sum(t.nbytes for t in kept if t.data_ptr() not in parameters)
    # Of both answers, which are walked through together.
    n_scored = sum(int(answer.mask.sum()) for answer in scored.values())
    # Per position: its hidden state, its target and its place; not its 600 log-probabilities.
    assert n_bytes <= n_scored * (4 * 32 + 8) + 6 * scored["original"].mask.numel() * 8
    assert n_bytes < n_scored * 4 * VOCABULARY / 2


# Low precision.


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_bfloat16_autocast_gives_float32_log_probabilities(sequences, small_chunks, family):
    model = tiny_model(family)
    exact = score(model, sequences)["original"].token_logps
    with torch.autocast("cpu", torch.bfloat16):
        scored = score(model, sequences)["original"]
        rounded = scored.token_logps
        loss = -scored.logp.sum()
    assert rounded.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of about 1 are off by 2**-8, some of them add up.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03)
    loss.backward()  # outside autocast, as the Trainer does; chunks are recomputed inside it
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_autocast_log_probabilities_add_up_to_one(sequences, small_chunks):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scored = score(tiny_model(), sequences)["original"]
        total = scored.distribution.map(lambda logps: logps.exp().sum(-1))
    # A softmax in bfloat16 would be off by 1e-2; float32 sums 600 terms to 1e-5.
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_entropy_of_an_untrained_model_is_near_log_vocabulary(sequences):
    # The start of a new model is nearly uniform: an anchor that no formula of ours shares.
    scored = score(tiny_model(), sequences)["original"]
    entropy = scored.distribution.map(lambda logps: -(logps.exp() * logps).sum(-1))
    assert entropy.mean().item() == pytest.approx(math.log(VOCABULARY), abs=0.05)
