"""The runner against a slow twin: one request at a time, all logits, no cache."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import tiny_model

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation import runner as runner_module
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.requests import Generate, LogProb
from unlearn_llm.evaluation.runner import Item, Runner, batches, halving
from unlearn_llm.evaluation.suite import Suite

# float32 sums in another order; log-probabilities are near -6 here.
CLOSE = {"rtol": 0, "atol": 1e-5}


def slow_logps(model, encoder, request):
    """Log-probabilities and first choices of the answer's tokens, from the definition."""
    encoded = encoder.pairs([request.question], [request.answer])[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].double()
    logps, greedy = [], []
    for position in range(encoded.n_prompt, len(encoded.ids)):
        before = torch.log_softmax(logits[position - 1], dim=-1)
        logps.append(before[encoded.ids[position]].item())
        greedy.append(before.argmax().item() == encoded.ids[position])
    return logps, greedy


def slow_generation(model, encoder, question, limit):
    """Greedy text, one full forward pass per token."""
    ids = encoder.prompts([question])[0]
    new = []
    while len(new) < limit:
        with torch.no_grad():
            new.append(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item())
        if new[-1] == encoder.tokenizer.eos_token_id:
            return encoder.tokenizer.decode(new[:-1], skip_special_tokens=True).strip(), True
    return encoder.tokenizer.decode(new, skip_special_tokens=True).strip(), False


def lean_towards_the_end(model, by):
    """Make the model end its answers now and then: its end token gets more likely."""
    inner = runner_module.unwrapped(model)
    head = inner.get_output_embeddings()
    end = inner.config.eos_token_id
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[end] = by


def test_log_probabilities_equal_those_of_single_full_passes(tiny, encoder, questions):
    requests = [LogProb(question, answer) for question, answer in questions]
    results = Runner(tiny, encoder).run(requests)
    tiny.eval()
    for request in requests:
        logps, greedy = slow_logps(tiny, encoder, request)
        torch.testing.assert_close(list(results[request].token_logps), logps, **CLOSE)
        assert list(results[request].greedy) == greedy


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
    results = Runner(tiny_llama, encoder).run(requests)
    for request in requests:
        torch.testing.assert_close(
            results[request].token_logps, expected[request].token_logps, **CLOSE
        )


def test_results_do_not_depend_on_the_batches(tiny, encoder, questions):
    scored = [LogProb(question, answer) for question, answer in questions]
    asked = [Generate(question) for question, _ in questions]
    alone = Runner(tiny, encoder, token_budget=1, generation_budget=1, max_new_tokens=12)
    together = Runner(tiny, encoder, max_new_tokens=12)
    first, second = alone.run([*scored, *asked]), together.run([*scored, *asked])
    for request in scored:
        torch.testing.assert_close(first[request].token_logps, second[request].token_logps, **CLOSE)
    for request in asked:
        assert first[request] == second[request]


@pytest.mark.parametrize("first_tokens", [3, 64])
def test_generations_equal_those_of_one_forward_pass_per_token(
    tiny, encoder, questions, monkeypatch, first_tokens
):
    monkeypatch.setattr(runner_module, "FIRST_TOKENS", first_tokens)
    lean_towards_the_end(tiny, by=0.15)
    results = Runner(tiny, encoder, max_new_tokens=12).run(Generate(q) for q, _ in questions)
    tiny.eval()
    for question, _ in questions:
        text, finished = slow_generation(tiny, encoder, question, limit=12)
        generation = results[Generate(question)]
        assert (generation.text, generation.finished) == (text, finished)
        assert list(generation.tokens) == encoder.tokenizer.tokenize(text)


def test_a_generation_that_ends_at_once_is_empty_and_finished(tiny_llama, encoder):
    lean_towards_the_end(tiny_llama, by=100.0)
    generation = Runner(tiny_llama, encoder).run([Generate("Who?")])[Generate("Who?")]
    assert generation.text == "" and generation.tokens == () and generation.finished


def test_a_generation_ends_where_the_context_ends(encoder):
    model = tiny_model()
    question = "What is it? " * 12
    room = 9
    model.config.max_position_embeddings = len(encoder.prompts([question])[0]) + room
    calls = []
    original = model.generate

    def counting(**keywords):
        calls.append(keywords["generation_config"].max_new_tokens)
        return original(**keywords)

    model.generate = counting
    Runner(model, encoder, max_new_tokens=20).run([Generate(question), Generate("Who?")])
    assert sorted(calls) == [room, 20]


def test_prompt_and_generation_together_can_be_limited(tiny_llama, encoder):
    prompt = len(encoder.prompts(["Who?"])[0])
    runner = Runner(tiny_llama, encoder, max_total_tokens=prompt + 5)
    assert runner.run([Generate("Who?")]) == Runner(tiny_llama, encoder, max_new_tokens=5).run(
        [Generate("Who?")]
    )


def test_equal_requests_are_asked_once(tiny_llama, encoder, monkeypatch):
    scored = []
    original = runner_module.score

    def counting(model, sequences, **keywords):
        scored.append(len(sequences["answer"]["input_ids"]))
        return original(model, sequences, **keywords)

    monkeypatch.setattr(runner_module, "score", counting)
    Runner(tiny_llama, encoder).run([LogProb("a?", "b"), LogProb("a?", "b"), LogProb("a?", "c")])
    assert sum(scored) == 2


def test_the_model_keeps_its_modes(tiny, encoder):
    tiny.train()
    frozen = next(iter(tiny.modules()))
    part = list(tiny.modules())[-1]
    part.eval()
    Runner(tiny, encoder, max_new_tokens=2).run([LogProb("a?", "b"), Generate("a?")])
    assert frozen.training and not part.training


def test_the_models_own_generation_settings_are_not_used(tiny_llama, encoder):
    plain = Runner(tiny_llama, encoder, max_new_tokens=8).run([Generate("Who?")])
    tiny_llama.generation_config.repetition_penalty = 5.0
    assert Runner(tiny_llama, encoder, max_new_tokens=8).run([Generate("Who?")]) == plain


def test_an_answer_without_tokens_is_an_error(tiny_llama, encoder):
    with pytest.raises(UserError, match="answer without tokens"):
        Runner(tiny_llama, encoder).run([LogProb("Who?", " ")])


def test_batches_keep_within_the_budget_longest_first():
    items = [Item(length, [0] * length) for length in (5, 40, 17, 16, 33, 1)]
    made = [[item.key for item in batch] for batch in batches(items, budget=96)]
    assert made == [[40, 33], [17, 16, 5], [1]]  # 2 x 48, 3 x 32, 1 x 16


def test_a_row_longer_than_the_budget_goes_alone():
    items = [Item(length, [0] * length) for length in (50, 60)]
    assert [len(batch) for batch in batches(items, budget=10)] == [1, 1]


def test_batches_that_do_not_fit_into_memory_are_halved():
    def fits_two(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        return [2 * number for number in batch]

    parts = list(halving(fits_two, [1, 2, 3, 4, 5]))
    assert [number for part in parts for number in part] == [2, 4, 6, 8, 10]


def test_a_single_row_that_does_not_fit_is_an_error():
    def fits_nothing(batch):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        list(halving(fits_nothing, [1, 2]))


PROGRAM = """
import sys
import torch
torch.distributed.init_process_group("gloo")
from models_for_tests import small_tokenizer, tiny_model
from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.requests import Generate, LogProb
from unlearn_llm.evaluation.suite import Suite
requests = [LogProb(f"Question {n}?", "An answer " * n) for n in range(1, 8)]
requests += [Generate(f"Question {n}?") for n in range(1, 6)]
results = Runner(tiny_model(), Encoder(small_tokenizer()), max_new_tokens=6).run(requests)
rank = torch.distributed.get_rank()
torch.save([results[request] for request in requests], f"{sys.argv[1]}/{rank}.pt")
suite = Suite.load("synthetic", limit=3, max_new_tokens=6)
evaluation = evaluate(suite, tiny_model(), Encoder(small_tokenizer()), f"{sys.argv[1]}/scores")
torch.save(evaluation.scores, f"{sys.argv[1]}/scores{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_get_what_one_gets(tmp_path, tokenizer):
    script = tmp_path / "program.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{PROGRAM}"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*launcher, str(script), str(tmp_path)], check=True, capture_output=True)
    requests = [LogProb(f"Question {n}?", "An answer " * n) for n in range(1, 8)]
    asked = [Generate(f"Question {n}?") for n in range(1, 6)]
    one = Runner(tiny_model(), Encoder(tokenizer), max_new_tokens=6).run([*requests, *asked])
    suite = Suite.load("synthetic", limit=3, max_new_tokens=6)
    scores = evaluate(suite, tiny_model(), Encoder(tokenizer)).scores
    for rank in (0, 1):
        of_rank = torch.load(tmp_path / f"scores{rank}.pt", weights_only=False)
        for name, score in scores.items():
            assert of_rank[name].value == pytest.approx(score.value, abs=1e-5)
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for request, result in zip(requests, two, strict=False):
            torch.testing.assert_close(result.token_logps, one[request].token_logps, **CLOSE)
        assert two[len(requests) :] == [one[request] for request in asked]
