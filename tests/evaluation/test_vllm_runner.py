"""vLLM's interface, imitated with a small model: what is sent to it, and what is read from it."""

import importlib.metadata
import sys
import types

import pytest
import torch
from models_for_tests import tiny_model
from slow_twins import CLOSE, lean_towards_the_end, slow_ids

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.requests import Generate, LogProb, TokenMoments
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.evaluation.vllm_runner import VllmRunner


class SamplingParams:
    """Refuses what vLLM's does not know."""

    def __init__(
        self, *, temperature=1.0, max_tokens=16, prompt_logprobs=None, stop_token_ids=None,
        detokenize=True,
    ):  # fmt: skip
        assert temperature == 0.0 and max_tokens >= 1 and detokenize is False
        self.max_tokens, self.prompt_logprobs = max_tokens, prompt_logprobs
        self.stop_token_ids = stop_token_ids


class LLM:
    """As vLLM answers: tokens with the stop token, and of a prompt's tokens {id: Logprob}."""

    def __init__(self, model, encoder, folder, context=256):
        self.model, self.encoder = model.eval(), encoder
        config = types.SimpleNamespace(
            model=str(folder), max_model_len=context, dtype=torch.float32, quantization=None,
            hf_config=model.config,
        )  # fmt: skip
        self.llm_engine = types.SimpleNamespace(model_config=config)
        self.calls = 0

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.calls += 1
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._answer(prompt["prompt_token_ids"], settings) for prompt, settings in pairs]

    def _answer(self, ids, settings):
        assert len(ids) + 1 <= self.llm_engine.model_config.max_model_len
        asked = types.SimpleNamespace(prompts=lambda questions: [ids], tokenizer=self.tokenizer)
        new = slow_ids(self.model, asked, "", settings.max_tokens)
        reason = "stop" if new[-1] in settings.stop_token_ids else "length"
        made = types.SimpleNamespace(token_ids=new, finish_reason=reason)
        said = self._of_prompt(ids) if settings.prompt_logprobs else None
        return types.SimpleNamespace(outputs=[made], prompt_logprobs=said)

    @property
    def tokenizer(self):
        return self.encoder.tokenizer

    @torch.no_grad()
    def _of_prompt(self, ids):
        logps = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        said = [None]
        for place in range(1, len(ids)):
            before, top = logps[place - 1], int(logps[place - 1].argmax())
            rank = {token: 1 + int((before > before[token]).sum()) for token in (top, ids[place])}
            said.append(
                {
                    token: types.SimpleNamespace(logprob=float(before[token]), rank=rank[token])
                    for token in rank
                }
            )
        return said


@pytest.fixture
def llm(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=SamplingParams))
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "0" if name == "vllm" else version(name)
    )
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    lean_towards_the_end(model, by=0.1)
    return LLM(model, encoder, tmp_path / "model")


def test_vllm_is_asked_what_the_runner_asks(llm, encoder, questions):
    scored = [LogProb(question, answer) for question, answer in questions]
    asked = [Generate(question) for question, _ in questions]
    theirs = VllmRunner(llm, encoder, max_new_tokens=12).run([*scored, *asked])
    ours = Runner(llm.model, encoder, max_new_tokens=12).run([*scored, *asked])
    for request in scored:
        torch.testing.assert_close(theirs[request].token_logps, ours[request].token_logps, **CLOSE)
        assert theirs[request].greedy == ours[request].greedy
    assert {request: theirs[request] for request in asked} == {r: ours[r] for r in asked}


def test_limits_and_context_hold(llm, encoder):
    prompt = len(encoder.prompts(["Who?"])[0])
    for context, total, expected in ((prompt + 3, None, 3), (256, prompt + 5, 5)):
        llm.llm_engine.model_config.max_model_len = context
        runner = VllmRunner(llm, encoder, max_total_tokens=total)
        plain = Runner(llm.model, encoder, max_new_tokens=expected)
        assert runner.run([Generate("Who?")]) == plain.run([Generate("Who?")])
    llm.llm_engine.model_config.max_model_len = prompt
    full = VllmRunner(llm, encoder).run([Generate("Who?")])[Generate("Who?")]
    assert full.text == "" and not full.finished


def test_a_suite_runs_on_vllm_and_goes_on_after_an_interruption(llm, encoder, tmp_path):
    suite = Suite.load("synthetic", limit=2, max_new_tokens=6)
    encoder.max_length = 256
    whole = evaluate(suite, llm, encoder, tmp_path / "whole")
    original = llm.generate

    def interrupted(prompts, settings, use_tqdm=True):
        if settings[0].prompt_logprobs is None:
            raise KeyboardInterrupt
        return original(prompts, settings, use_tqdm)

    llm.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite, llm, encoder, tmp_path / "cut")
    llm.generate, llm.calls = original, 0
    assert evaluate(suite, llm, encoder, tmp_path / "cut").records == whole.records
    assert llm.calls == 1  # the generations only
    assert whole.details["model"]["type"] == "llama"


def test_weights_that_cannot_be_told_from_others_are_refused(llm, encoder):
    llm.llm_engine.model_config.model = "somebody/model"
    with pytest.raises(UserError, match="no folder"):
        VllmRunner(llm, encoder).describe()


def test_what_vllm_cannot_tell_is_refused(llm, encoder):
    with pytest.raises(UserError, match="no answer to TokenMoments"):
        VllmRunner(llm, encoder).run([TokenMoments("Who?", "She.")])
