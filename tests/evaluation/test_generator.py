"""Greedy generation against a slow twin: one forward pass per token, one question at a time."""

import pytest
import torch
from models_for_tests import tiny_model
from slow_twins import lean_towards_the_end, slow_generation, slow_ids, tiny_of

from unlearn_llm.evaluation import generator as generator_module
from unlearn_llm.evaluation.generator import STEPPED
from unlearn_llm.evaluation.requests import Generate
from unlearn_llm.evaluation.runner import Runner

LIMIT = 12


def assert_equal_to_the_slow_twin(model, encoder, questions):
    results = Runner(model, encoder, max_new_tokens=LIMIT).run(Generate(q) for q, _ in questions)
    model.eval()
    for question, _ in questions:
        text, finished = slow_generation(model, encoder, question, LIMIT)
        generation = results[Generate(question)]
        assert (generation.text, generation.finished) == (text, finished)
        assert list(generation.tokens) == encoder.tokenizer.tokenize(text)
    return results


@pytest.mark.parametrize("leave", [1e9, 8, 1])
def test_generations_equal_those_of_one_forward_pass_per_token(
    tiny, encoder, questions, monkeypatch, leave
):
    """Whether ended rows leave at once, by and by or never."""
    monkeypatch.setattr(generator_module, "LEAVE", leave)
    lean_towards_the_end(tiny, by=0.15)
    assert_equal_to_the_slow_twin(tiny, encoder, questions)


@pytest.mark.parametrize("model_type", sorted(STEPPED))
def test_steps_of_our_own_are_right_in_every_architecture(model_type, encoder, questions):
    model = tiny_of(model_type, "eager")
    lean_towards_the_end(model, by=3.0)
    results = assert_equal_to_the_slow_twin(model, encoder, questions)
    assert len({len(result.tokens) for result in results.values()}) > 1  # some rows left early


def test_rows_leave_a_cache_with_a_window(encoder, questions):
    model = tiny_of("mistral", sliding_window=8)
    lean_towards_the_end(model, by=3.0)
    assert_equal_to_the_slow_twin(model, encoder, questions)


def test_other_models_generate_as_they_know(encoder, questions):
    model = tiny_of("bloom", "eager")
    lean_towards_the_end(model, by=3.0)
    assert_equal_to_the_slow_twin(model, encoder, questions)


def rows_of_passes(model):
    """How many rows each forward pass has, filled in as they come."""
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: rows.append(len(keywords["input_ids"])), with_kwargs=True
    )
    return rows


def test_rows_that_have_ended_are_computed_no_longer(encoder, questions):
    """All rows at first, then only those that are still open."""
    model = tiny_of("llama")
    lean_towards_the_end(model, by=3.0)
    made = [len(slow_ids(model, encoder, question, LIMIT)) for question, _ in questions]
    assert min(made) < max(made)
    rows = rows_of_passes(model)
    runner = Runner(model, encoder, max_new_tokens=LIMIT)
    runner.run(Generate(question) for question, _ in questions)
    assert rows == [sum(length > step for length in made) for step in range(max(made))]


def test_the_cache_holds_what_the_budget_allows(tiny_llama, encoder, questions):
    rows = rows_of_passes(tiny_llama)
    budget = 2 * (32 + LIMIT)  # two prompts of up to 32 tokens
    runner = Runner(tiny_llama, encoder, max_new_tokens=LIMIT, generation_budget=budget)
    runner.run(Generate(question) for question, _ in questions)
    assert max(rows) == 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_a_generation_ends_where_the_context_ends(model_type, encoder):
    """GPT-2 would fail beyond its last place, also for a row that ended there before others."""
    model = tiny_of(model_type, "eager")
    long = "What is it? " * 12
    room = 9
    model.config.max_position_embeddings = len(encoder.prompts([long])[0]) + room
    if model_type == "gpt2":
        places = model.config.max_position_embeddings
        model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:places])
    asked = [Generate(long), Generate("Who?"), *(Generate(f"Who {n}?") for n in range(9))]
    results = Runner(model, encoder, max_new_tokens=20).run(asked)
    for request in asked:
        limit = room if request.question == long else 20
        expected = slow_generation(model, encoder, request.question, limit)
        assert (results[request].text, results[request].finished) == expected


def test_a_prompt_that_fills_the_context_gets_no_answer(encoder):
    model = tiny_model()
    model.config.max_position_embeddings = len(encoder.prompts(["Who?"])[0])
    generation = Runner(model, encoder).run([Generate("Who?")])[Generate("Who?")]
    assert generation.text == "" and not generation.finished


def test_a_generation_that_ends_at_once_is_empty_and_finished(tiny_llama, encoder):
    lean_towards_the_end(tiny_llama, by=100.0)
    generation = Runner(tiny_llama, encoder).run([Generate("Who?")])[Generate("Who?")]
    assert generation.text == "" and generation.tokens == () and generation.finished


def test_prompt_and_generation_together_can_be_limited(tiny_llama, encoder):
    prompt = len(encoder.prompts(["Who?"])[0])
    runner = Runner(tiny_llama, encoder, max_total_tokens=prompt + 5)
    assert runner.run([Generate("Who?")]) == Runner(tiny_llama, encoder, max_new_tokens=5).run(
        [Generate("Who?")]
    )
