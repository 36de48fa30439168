"""Puts questions to a model under attack and reads how much of the answers comes back."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from unlearn_llm.attacks.base import Fact, Subject
from unlearn_llm.dataset import Collator
from unlearn_llm.evaluation.batching import Item, batches, evaluating, halving
from unlearn_llm.evaluation.generator import greedy_config, stop_ids
from unlearn_llm.evaluation.requests import Generate
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.texts import overlap
from unlearn_llm.gumbel import GumbelNoise
from unlearn_llm.scoring import unwrapped

BUDGET = 16384
"""Most tokens (rows x (padded prompt + new tokens)) of a batch."""


def recalls(
    subject: Subject,
    facts: Sequence[Fact],
    questions: Sequence[str] | None = None,
    model: Any = None,
) -> dict[str, float]:
    """Ask greedily; give the recall of each answer in what comes back, by row id.

    Rows whose answer has nothing to compare are left out.

    Args:
        questions: In place of the facts' own.
        model: In place of the subject's.
    """
    texts = greedy_answers(subject, questions or [fact.question for fact in facts], model)
    found = [overlap(fact.answer, text) for fact, text in zip(facts, texts, strict=True)]
    return {
        fact.id: recall for fact, recall in zip(facts, found, strict=True) if recall is not None
    }


def greedy_answers(subject: Subject, questions: Sequence[str], model: Any = None) -> list[str]:
    """Ask greedily; give the texts."""
    asked = [Generate(question) for question in questions]
    runner = Runner(
        subject.model if model is None else model,
        subject.encoder,
        max_new_tokens=subject.max_new_tokens,
        progress=subject.progress,
    )
    answers = runner.run(asked)
    return [str(answers[request].text) for request in asked]  # type: ignore[union-attr]


def continuations(
    subject: Subject, prompts: Sequence[Item], temperature: float | None = None
) -> dict[Any, str]:
    """Let the model go on with prompts of tokens; give its texts by the prompts' keys.

    Args:
        temperature: Of the samples; None: greedy. A sample is fixed by its key, which must be a
            string then, whatever the batches (but for rounding).
    """
    model, tokenizer = subject.model, subject.encoder.tokenizer
    inner = unwrapped(model)
    ends = stop_ids(model, subject.encoder)
    pad_id = tokenizer.pad_token_id
    collator = Collator(int(tokenizer.eos_token_id if pad_id is None else pad_id))
    context = inner.config.to_dict().get("max_position_embeddings") or 10**9

    def go_on(batch: Sequence[Item]) -> list[tuple[Any, str]]:
        ids = collator.pad([item.ids[::-1] for item in batch], collator.pad_id).flip(1)
        mask = collator.pad([[1] * len(item.ids) for item in batch], 0).flip(1)
        noise = LogitsProcessorList()
        if temperature is not None:
            noise.append(GumbelNoise([item.key for item in batch], temperature, inner.device))
        generated = model.generate(
            input_ids=ids.to(inner.device),
            attention_mask=mask.to(inner.device),
            generation_config=greedy_config(limit, collator.pad_id, ends),
            logits_processor=noise,
        )
        new = generated[:, ids.shape[1] :].tolist()
        return [
            (item.key, _text(tokenizer, row, ends)) for item, row in zip(batch, new, strict=True)
        ]

    # One limit for all, so that a text does not depend on the rows beside it.
    limit = min(subject.max_new_tokens, context - max(len(item.ids) for item in prompts))
    found: dict[Any, str] = {}
    with evaluating(model), torch.no_grad():
        for batch in batches(prompts, BUDGET, extra=limit):
            for part in halving(go_on, batch):
                found.update(part)
    return found


def _text(tokenizer: Any, ids: Sequence[int], ends: set[int]) -> str:
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
