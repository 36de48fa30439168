"""Shared prompts against a slow twin: one answer at a time, in every architecture."""

import pytest
import torch
from models_for_tests import tiny_model
from slow_twins import CLOSE, slow_logps, tiny_of

from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation import scorer as scorer_module
from unlearn_llm.evaluation.requests import LogProb
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.scorer import Scorer, reads_trees
from unlearn_llm.scoring import PLAIN_HEADS


@pytest.fixture
def many_answers(questions):
    """Every question with every answer, and two answers that differ in their last word."""
    answers = [answer for _, answer in questions]
    answers += ["The answer is the first one.", "The answer is the first two."]
    return [LogProb(question, answer) for question, _ in questions for answer in answers]


def assert_equal_to_the_slow_twin(model, encoder, requests, **options):
    results = Runner(model, encoder, **options).run(requests)
    model.eval()
    for request in requests:
        logps, greedy = slow_logps(model, encoder, request)
        torch.testing.assert_close(list(results[request].token_logps), logps, **CLOSE)
        assert list(results[request].greedy) == greedy


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", sorted(PLAIN_HEADS))
def test_shared_prompts_give_what_single_passes_give(model_type, attention, encoder, many_answers):
    model = tiny_of(model_type, attention)
    assert reads_trees(model, encoder.max_length)
    assert_equal_to_the_slow_twin(model, encoder, many_answers)


def test_shared_prompts_through_an_adapter(tiny, encoder, many_answers):
    assert reads_trees(tiny, encoder.max_length)
    assert_equal_to_the_slow_twin(tiny, encoder, many_answers)


@pytest.mark.parametrize("template", ["phi", "llama2"])
def test_the_border_of_prompt_and_answer_is_the_encoders(template, tokenizer, many_answers):
    encoder = Encoder(tokenizer, template, max_length=128)
    assert_equal_to_the_slow_twin(tiny_model(), encoder, many_answers)


def test_prompts_of_a_chat_template_are_shared(chat_tokenizer, many_answers):
    encoder = Encoder(chat_tokenizer, "chat", max_length=128)
    assert_equal_to_the_slow_twin(tiny_of("llama", words=620), encoder, many_answers)


def test_answers_beyond_one_row_are_cut_into_several(encoder, many_answers, monkeypatch):
    monkeypatch.setattr(scorer_module, "TREE_TOKENS", 80)
    model = tiny_model()
    items = Scorer(model, encoder, 0, None).items(many_answers)
    questions = {request.question for request in many_answers}
    assert len(questions) < len(items) < len(many_answers)
    assert max(len(item.ids) for item in items) <= 80
    assert_equal_to_the_slow_twin(model, encoder, many_answers)


def test_a_prompt_is_computed_once(encoder):
    requests = [LogProb("Who?", answer) for answer in ("Anna Berg.", "Nobody here.", "5")]
    (item,) = Scorer(tiny_model(), encoder, 0, None).items(requests)
    encoded = encoder.pairs(["Who?"] * 3, [request.answer for request in requests])
    prompt = len(encoder.prompts(["Who?"])[0])
    # The prompt, and every answer but for its last token.
    assert len(item.ids) == prompt + sum(len(one.ids) - prompt - 1 for one in encoded)


def test_models_that_would_not_honour_the_mask_are_asked_plainly(encoder, many_answers):
    windowed = tiny_of("mistral", sliding_window=8)
    for model in (windowed, tiny_of("bloom", "eager"), tiny_of("gemma")):
        assert not reads_trees(model, encoder.max_length)
        assert_equal_to_the_slow_twin(model, encoder, many_answers[:9])
    assert reads_trees(tiny_of("mistral", sliding_window=128), encoder.max_length)
    windowed.config.sliding_window = None
    windowed.config._attn_implementation = "flash_attention_2"
    assert not reads_trees(windowed, encoder.max_length)


def test_double_precision_leaves_no_doubt(encoder, many_answers):
    """A wrong mask or position would show at once; in float64 nothing hides behind rounding."""
    model = tiny_of("llama").double()
    results = Runner(model, encoder).run(many_answers)
    for request in many_answers:
        logps, _ = slow_logps(model, encoder, request)
        # log_softmax is float32 in both.
        torch.testing.assert_close(list(results[request].token_logps), logps, rtol=0, atol=2e-6)


def test_greedy_flags_mark_the_models_own_answer(tiny, encoder, questions):
    """What a model generates is its first choice at every position."""
    question = questions[0][0]
    prompt = encoder.prompts([question])[0]
    tiny.eval()
    ids = tiny.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=4,
        do_sample=False,
    )[0]
    own = encoder.tokenizer.decode(ids[len(prompt) :])
    request = LogProb(question, own)
    result = Runner(tiny, encoder).run([request])[request]
    assert list(result.greedy) == slow_logps(tiny, encoder, request)[1]
    assert any(result.greedy)


def test_a_model_whose_head_is_not_plain_is_scored_from_its_logits(
    tiny_llama, encoder, questions, monkeypatch
):
    requests = [LogProb(question, answer) for question, answer in questions]
    expected = Runner(tiny_llama, encoder).run(requests)
    monkeypatch.setattr("unlearn_llm.scoring.PLAIN_HEADS", set())
    monkeypatch.setattr("unlearn_llm.evaluation.scorer.PLAIN_HEADS", set())
    results = Runner(tiny_llama, encoder).run(requests)
    for request in requests:
        torch.testing.assert_close(
            results[request].token_logps, expected[request].token_logps, **CLOSE
        )
