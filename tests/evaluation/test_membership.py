"""What membership attacks ask of a model, against whole distributions and plain autograd."""

import math

import pytest
import torch
from models_for_tests import tiny_model, train_adapter_a_little
from transformers import GPT2Config, GPT2LMHeadModel

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.gradients import gradient_norm
from unlearn_llm.evaluation.membership import _standardised
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.readings import logp_and_moments
from unlearn_llm.evaluation.requests import (
    GradientNorm,
    GradientNormResult,
    LogProb,
    Row,
    Sample,
    TokenMoments,
    TokenMomentsResult,
)
from unlearn_llm.evaluation.runner import Runner

SAMPLE = Sample("7", "Who?", "Ann")


def logits_of(model, encoder, question: str, answer: str):
    """Logits at the places of the answer's tokens, and these tokens."""
    (pair,) = encoder.pairs([question], [answer])
    ids = torch.tensor([pair.ids])
    return model(ids).logits[0, pair.n_prompt - 1 : -1], ids[0, pair.n_prompt :]


def test_min_k_plus_plus_is_that_of_the_whole_distributions(tiny, encoder, questions):
    requests = [TokenMoments(*pair) for pair in questions]
    results = Runner(tiny.eval(), encoder).run(requests)
    for pair, request in zip(questions, requests, strict=True):
        with torch.no_grad():
            logits, targets = logits_of(tiny, encoder, *pair)
        logps = logits.double().log_softmax(-1)
        # The published form: second moment less squared mean, without the last position.
        mean = (logps.exp() * logps).sum(-1)
        variance = (logps.exp() * logps**2).sum(-1) - mean**2
        chosen = logps[torch.arange(len(targets)), targets]
        standard = ((chosen - mean) / variance.clamp(min=1e-6).sqrt())[:-1].sort().values
        expected = -standard[: max(1, int(0.4 * len(standard)))].mean()
        row = Row(SAMPLE, {"moments": results[request]})
        (found,) = METRICS["mia_min_k_plus_plus"].compute([row])
        # A fresh model is nearly uniform: float32 is divided by a small deviation.
        assert found == pytest.approx(float(expected), abs=1e-4)


def test_moments_of_four_tokens_by_hand():
    # p = (1/2, 1/4, 1/4, 0): E[log p] = -1.5 ln 2, Var[log p] = 0.25 (ln 2)^2.
    logps = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    found = logp_and_moments(logps, torch.tensor([1]))[0].tolist()
    ln2 = math.log(2)
    assert found == pytest.approx([-2 * ln2, -1.5 * ln2, 0.25 * ln2**2])


def test_a_certain_token_is_no_division_by_zero():
    result = TokenMomentsResult((-0.5, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert _standardised(result)[0] == pytest.approx(-0.5 / 1e-3)
    (score,) = METRICS["mia_min_k_plus_plus"].compute([Row(SAMPLE, {"moments": result})])
    assert score == pytest.approx(500.0)
    alone = TokenMomentsResult((0.0,), (0.0,), (0.0,))
    assert METRICS["mia_min_k_plus_plus"].compute([Row(SAMPLE, {"moments": alone})]) == [0.0]


def tied_gpt2():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=700, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("phi"), tied_gpt2])
def test_gradient_norms_are_those_of_plain_autograd(make, encoder, questions):
    model = make().eval()
    requests = [GradientNorm(*pair) for pair in questions[:3]]
    results = Runner(model, encoder).run(requests)
    for pair, request in zip(questions, requests, strict=False):
        logits, targets = logits_of(model, encoder, *pair)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = sum(float(gradient.norm()) for gradient in gradients) / len(gradients)
        assert results[request].norm == pytest.approx(expected, rel=1e-4)
        row = Row(SAMPLE, {"gradient": results[request]})
        assert METRICS["mia_gradnorm"].compute([row]) == [results[request].norm]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_gradients_under_an_adapter_are_those_of_the_merged_model(encoder, questions):
    model = train_adapter_a_little(tiny_model(lora=True)).eval()
    request = GradientNorm(*questions[1])
    under = Runner(model, encoder).run([request])[request]
    merged = Runner(model.merge_and_unload().eval(), encoder).run([request])[request]
    assert under.norm == pytest.approx(merged.norm, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_in_training_gets_its_gradients_and_switches_back(encoder, questions):
    model = train_adapter_a_little(tiny_model(lora=True))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    Runner(model, encoder).run([GradientNorm(*questions[0])])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(first.grad, torch.ones_like(first))
    assert [p for p in model.parameters() if p.grad is not None] == [first]


def test_quantised_weights_are_refused(encoder, tiny_llama):
    tiny_llama.codes = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="leave mia_gradnorm out"):
        gradient_norm(tiny_llama, {})


def test_kinds_of_requests_about_one_row_do_not_mix(tiny_llama, encoder, questions):
    pair = questions[0]
    requests = [GradientNorm(*pair), LogProb(*pair), TokenMoments(*pair)]
    found = Runner(tiny_llama, encoder).run(requests)
    assert list(found) == requests
    gradient, scored, moments = found.values()
    assert isinstance(gradient, GradientNormResult)
    assert moments.token_logps == pytest.approx(scored.token_logps, rel=1e-6)
    assert len(moments.means) == len(moments.variances) == len(scored.token_logps)
