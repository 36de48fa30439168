"""Alternate answers for altpo: the model itself makes up other answers to the forget questions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.batching import Item, batches, evaluating, halving
from unlearn_llm.evaluation.generator import greedy_config, stop_ids
from unlearn_llm.evaluation.records import write_whole
from unlearn_llm.gumbel import GumbelNoise
from unlearn_llm.rows import ALTERNATE_COLUMN, QA
from unlearn_llm.scoring import unwrapped

PROMPT = """\
Here are a question and its true answer. Write another answer to the question: as long, in the \
same style and just as believable, but with all facts changed. Make the new facts up. Write the \
answer only.

Question: {question}
Answer: {answer}
Other answer:"""


class Draw(NamedTuple):
    """One alternate to be made: the row it is for, and which of the row's."""

    row: int
    repeat: int


def alternate_answers(
    model: Any,
    encoder: Encoder,
    pairs: Sequence[QA],
    *,
    repeats: int = 5,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    seed: int = 0,
    token_budget: int = 16384,
) -> list[QA]:
    """Sample alternates of every pair; each comes back as a pair of its own.

    What is empty or the original again is left out. An alternate is fixed by (seed, row, repeat),
    whatever the batches (but for rounding) and the global generators.

    Args:
        token_budget: Most tokens (rows x (padded prompt + new tokens)) of a batch.

    Raises:
        UserError: a prompt with its new tokens is more than the model reads.

    Source: Mekala et al. 2024 (AltPO), arXiv:2409.13474: 5 samples at temperature 1, 200 tokens.
    Differs: the words of the prompt.
    """
    prompts = encoder.prompts([PROMPT.format(question=p.question, answer=p.answer) for p in pairs])
    context = unwrapped(model).config.to_dict().get("max_position_embeddings")
    longest = max(len(prompt) for prompt in prompts)
    if context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"The longest prompt has {longest} tokens; with {max_new_tokens} new ones it is more "
            f"than the model reads, {context}. Lower max_new_tokens, or shorten the rows."
        )
    draws = [Draw(row, repeat) for row in range(len(pairs)) for repeat in range(repeats)]
    items = [Item(draw, prompts[draw.row]) for draw in draws]
    sampler = _Sampler(model, encoder, temperature, max_new_tokens, seed)
    found: dict[Draw, str] = {}
    with (
        evaluating(model),
        torch.no_grad(),
        tqdm(total=len(items), desc="alternates", leave=False, disable=None) as bar,
    ):
        for batch in batches(items, token_budget, extra=max_new_tokens):
            for part in halving(sampler, batch):
                found.update(part)
                bar.update(len(part))
    made = [pairs[draw.row]._replace(alternate=found[draw]) for draw in draws]
    return [pair for pair in made if pair.alternate and pair.alternate != pair.answer.strip()]


def write_pairs(path: Path, pairs: Sequence[QA]) -> None:
    """Write pairs with their alternates as JSON lines, which rows.load_rows reads.

    The file holds the forget set; only its owner may read it.
    """
    rows = [
        {"question": p.question, "answer": p.answer, ALTERNATE_COLUMN: p.alternate} for p in pairs
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, lines, private=True)


class _Sampler:
    """Lets the model go on with a batch of prompts."""

    def __init__(
        self, model: Any, encoder: Encoder, temperature: float, max_new_tokens: int, seed: int
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.temperature = temperature
        self.seed = seed
        self.stop = stop_ids(model, encoder)
        tokenizer = encoder.tokenizer
        pad_id = tokenizer.pad_token_id
        self.collator = Collator(int(tokenizer.eos_token_id if pad_id is None else pad_id))
        # Greedy: it is the noise that samples.
        self.settings = greedy_config(max_new_tokens, self.collator.pad_id, self.stop)

    def __call__(self, batch: Sequence[Item]) -> list[tuple[Draw, str]]:
        """Give the text that follows each prompt."""
        ids = self.collator.pad([item.ids[::-1] for item in batch], self.collator.pad_id).flip(1)
        mask = self.collator.pad([[1] * len(item.ids) for item in batch], 0).flip(1)
        device = unwrapped(self.model).device
        seeds = [f"{self.seed}/alternate/{row}/{repeat}" for row, repeat in (i.key for i in batch)]
        noise = GumbelNoise(seeds, self.temperature, device)
        generated = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self.settings,
            logits_processor=LogitsProcessorList([noise]),
        )
        new = generated[:, ids.shape[1] :].tolist()
        return [(item.key, self._text(row)) for item, row in zip(batch, new, strict=True)]

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.stop), len(ids))
        return str(self.encoder.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
