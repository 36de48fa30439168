"""What a runner makes of requests: each once, in any batches, on any number of processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import tiny_model
from slow_twins import CLOSE

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.requests import Generate, LogProb
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.scorer import Scorer
from unlearn_llm.evaluation.suite import Suite


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


def test_equal_requests_are_asked_once(tiny_llama, encoder, monkeypatch):
    scored = []
    original = Scorer.answer

    def counting(self, batch):
        answers = original(self, batch)
        scored.extend(request.answer for request, _ in answers)
        return answers

    monkeypatch.setattr(Scorer, "answer", counting)
    Runner(tiny_llama, encoder).run([LogProb("a?", "b"), LogProb("a?", "b"), LogProb("a?", "c")])
    assert sorted(scored) == ["b", "c"]


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


PROGRAM = """
import sys
import torch
torch.distributed.init_process_group("gloo")
from models_for_tests import small_tokenizer, tiny_model
from ranks import leave
from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.requests import Generate, LogProb
from unlearn_llm.evaluation.scorer import Scorer
from unlearn_llm.evaluation.suite import Suite
requests = [LogProb(f"Question {n}?", "An answer " * n) for n in range(1, 8)]
requests += [Generate(f"Question {n}?") for n in range(1, 6)]
results = Runner(tiny_model(), Encoder(small_tokenizer()), max_new_tokens=6).run(requests)
rank = torch.distributed.get_rank()
torch.save([results[request] for request in requests], f"{sys.argv[1]}/{rank}.pt")
suite = Suite.load("synthetic", limit=3, max_new_tokens=6)
evaluation = evaluate(suite, tiny_model(), Encoder(small_tokenizer()), f"{sys.argv[1]}/scores")
torch.save(evaluation.scores, f"{sys.argv[1]}/scores{rank}.pt")
leave()
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
