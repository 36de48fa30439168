"""Answers Generate requests: what a model says, greedily. Rows that have ended leave the batch."""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.batching import MULTIPLE, Item
from unlearn_llm.evaluation.cache import roomy_cache
from unlearn_llm.evaluation.requests import Generate, Generation, Request
from unlearn_llm.scoring import PLAIN_HEADS, unwrapped

STEPPED = PLAIN_HEADS | {"gemma", "gemma2", "gemma3_text", "cohere"}
"""Models that need nothing at a step but tokens, mask, positions and the cache."""
LEAVE = 8
"""Rows leave when one in so many has ended: leaving copies the keys and values of the others."""


class Generator:
    """Lets one model answer questions.

    Attributes:
        budget: Most tokens (rows x (padded prompt + new tokens)) of a batch; it bounds the
            key-value cache.
        extra: Most new tokens of a row.
    """

    what = "generating"

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        pad_id: int,
        budget: int,
        max_new_tokens: int,
        max_total_tokens: int | None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.budget = budget
        self.extra = max_new_tokens
        self.stop_ids = stop_ids(model, encoder)
        self._max_total_tokens = max_total_tokens
        self._collator = Collator(pad_id, MULTIPLE)
        self._context: int | None = getattr(
            unwrapped(model).config, "max_position_embeddings", None
        )
        self._steps = steps_plainly(model)

    def items(self, requests: Sequence[Generate]) -> list[Item]:
        """Make a row of each request."""
        if not requests:
            return []
        prompts = self.encoder.prompts([request.question for request in requests])
        return [Item(request, ids) for request, ids in zip(requests, prompts, strict=True)]

    def requests_of(self, item: Item) -> Sequence[Request]:
        """Give the requests that a row answers."""
        return [item.key]

    def answer(self, batch: Sequence[Item]) -> list[tuple[Request, Generation]]:
        """Let the model go on with each prompt."""
        rooms = {item.key: self._room(item) for item in batch}
        open_items = [item for item in batch if rooms[item.key]]
        new_ids: dict[Request, list[int]] = {item.key: [] for item in batch}
        if open_items:
            go_on = self._step_by_step if self._steps else self._call
            new_ids |= go_on(open_items, rooms)
        return [(item.key, self._read(new_ids[item.key], item.key.stop)) for item in batch]

    def _room(self, item: Item) -> int:
        """How many new tokens a prompt may get."""
        limits = [limit for limit in (self._context, self._max_total_tokens) if limit is not None]
        most = min(self.extra, item.key.max_new_tokens or self.extra)
        return max(0, min([most, *(limit - len(item.ids) for limit in limits)]))

    def _step_by_step(
        self, batch: Sequence[Item], rooms: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Make a token for every row, and another for those that are open, and so on."""
        inner = unwrapped(self.model)
        ids, mask = self._padded(batch)
        columns = ids.shape[1]
        mask = F.pad(mask, (0, max(rooms.values())), value=1)
        positions = (mask[:, :columns].cumsum(1) - 1).clamp(min=0)
        cache = roomy_cache(inner)
        keys: list[Request] = [item.key for item in batch]
        new_ids: dict[Request, list[int]] = {key: [] for key in keys}
        while True:
            logits = self.model(
                input_ids=ids,
                attention_mask=mask[:, :columns],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            ids = logits[:, -1:].float().argmax(-1).to(inner.device)  # (rows, 1)
            for key, token in zip(keys, ids.flatten().tolist(), strict=True):
                if self._is_open(new_ids[key], rooms[key]):
                    new_ids[key].append(token)
            still = [row for row, key in enumerate(keys) if self._is_open(new_ids[key], rooms[key])]
            if not still:
                return new_ids
            columns += 1
            # Ended rows are computed until they leave, but have no place beyond the context.
            positions = (positions[:, -1:] + 1).clamp(max=(self._context or columns) - 1)
            if len(keys) - len(still) >= len(keys) / LEAVE:
                kept = torch.tensor(still, device=inner.device)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
                cache.batch_select_indices(kept)
                keys = [keys[row] for row in still]

    def _call(
        self, batch: Sequence[Item], rooms: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Leave it to the model's own `generate`, once for each limit."""
        new_ids = {}
        for room in {rooms[item.key]: None for item in batch}:
            items = [item for item in batch if rooms[item.key] == room]
            ids, mask = self._padded(items)
            generated = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=greedy_config(room, self._collator.pad_id, self.stop_ids),
            )
            for item, row in zip(items, generated[:, ids.shape[1] :].tolist(), strict=True):
                new_ids[item.key] = self._cut(row)
        return new_ids

    def _padded(self, batch: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Stack prompts, filled up on the left: ids and mask, (B, T) each."""
        reversed_ids = [item.ids[::-1] for item in batch]  # the collator pads on the right
        ids = self._collator.pad(reversed_ids, self._collator.pad_id).flip(1)
        mask = self._collator.pad([[1] * len(item.ids) for item in batch], 0).flip(1)
        device = unwrapped(self.model).device
        return ids.to(device), mask.to(device)

    def _is_open(self, ids: Sequence[int], room: int) -> bool:
        return len(ids) < room and not (ids and ids[-1] in self.stop_ids)

    def _read(self, ids: list[int], stop: Sequence[str]) -> Generation:
        finished = bool(ids) and ids[-1] in self.stop_ids
        return read_generation(ids[:-1] if finished else ids, finished, self.encoder, stop)

    def _cut(self, ids: list[int]) -> list[int]:
        """Keep the ids up to the first stop token; pads stand after it."""
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: position + 1]
        return ids


def read_generation(
    ids: Sequence[int], finished: bool, encoder: Encoder, stop: Sequence[str] = ()
) -> Generation:
    """Make text of new tokens, up to the first of the texts that stop it."""
    text = str(encoder.tokenizer.decode(list(ids), skip_special_tokens=True))
    ends = [text.find(mark) for mark in stop if mark in text]
    text = text[: min(ends, default=len(text))].strip()
    return Generation(text, tuple(encoder.tokenizer.tokenize(text)), finished)


def steps_plainly(model: nn.Module) -> bool:
    """Can we make the steps of a model ourselves? A soft prompt would be left out."""
    prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return unwrapped(model).config.model_type in STEPPED and not prompted


def stop_ids(model: nn.Module, encoder: Encoder) -> set[int]:
    """Collect the tokens that end an answer: the tokenizer's end token and the model's own."""
    named = unwrapped(model).generation_config.eos_token_id
    model_ids = named if isinstance(named, list) else [named]
    return {int(encoder.tokenizer.eos_token_id), *(int(i) for i in model_ids if i is not None)}


def greedy_config(max_new_tokens: int, pad_id: int, ends: Collection[int]) -> GenerationConfig:
    """Name the settings of greedy generation, whatever the model's own are.

    Named one by one: what is left out comes from the model's own generation_config, and a
    repetition penalty there would change what "greedy" means.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends),
    )
