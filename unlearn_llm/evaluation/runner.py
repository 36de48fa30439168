"""Puts requests to a model: each distinct one once, sorted by length, in batches, on every rank.

What the answers mean is the metrics' business. Nothing here depends on how requests fall into
batches, except for rounding.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoded, Encoder
from unlearn_llm.evaluation.cache import roomy_cache
from unlearn_llm.evaluation.requests import (
    Generate,
    Generation,
    LogProb,
    LogProbResult,
    Request,
    Result,
)
from unlearn_llm.scoring import PLAIN_HEADS, score, unwrapped

T = TypeVar("T")

MULTIPLE = 16
"""Padded lengths are rounded up to a multiple of this, so that few distinct shapes occur."""
CPU_BUDGET = 2048
"""Tokens of a scored batch on a CPU: larger ones fall out of its caches and are a third slower."""
GPU_BUDGET = 16384
FIRST_TOKENS = 64
"""Rows that have not ended after so many new tokens are gathered and continued together.

An answer of TOFU has 36 tokens, and one row that rambles on to the limit would otherwise keep a
whole batch computing.
"""


class Item(NamedTuple):
    """A request in tokens."""

    key: Any
    ids: list[int]


class Runner:
    """Asks one model.

    Attributes:
        token_budget: Most tokens (rows x padded length) of a batch that is scored; None: what
            is quick on the model's device. Batches that do not fit into memory are halved.
        generation_budget: Most tokens (rows x (padded prompt + new tokens)) of a batch that
            generates; it bounds the key-value cache.
        max_new_tokens: Where a generation is cut.
        max_total_tokens: Where prompt and generation together are cut, too.
        progress: Show progress bars; None: when stderr is a terminal and transformers shows its
            own.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        token_budget: int | None = None,
        generation_budget: int = 65536,
        max_new_tokens: int = 200,
        max_total_tokens: int | None = None,
        progress: bool | None = None,
    ) -> None:
        # DDP broadcasts buffers in every forward, which hangs when ranks run unlike many batches.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.encoder = encoder
        on_cpu = unwrapped(self.model).device.type == "cpu"
        self.token_budget = token_budget or (CPU_BUDGET if on_cpu else GPU_BUDGET)
        self.generation_budget = generation_budget
        self.max_new_tokens = max_new_tokens
        self.max_total_tokens = max_total_tokens
        if progress is None:
            progress = sys.stderr.isatty() and logging.is_progress_bar_enabled()
        self.progress = progress
        tokenizer = encoder.tokenizer
        pad_id = tokenizer.pad_token_id
        self._collator = Collator(
            int(tokenizer.eos_token_id if pad_id is None else pad_id), MULTIPLE
        )
        self._stop_ids = stop_ids(self.model, encoder)

    def run(self, requests: Iterable[Request]) -> dict[Request, Result]:
        """Answer every distinct request.

        With several processes (torch.distributed is initialised) each answers its share, and all
        of them get all the answers; every process must be given the same requests.

        Raises:
            UserError: a question or an answer that cannot be encoded.
        """
        distinct = list(dict.fromkeys(requests))
        pairs = [request for request in distinct if isinstance(request, LogProb)]
        asked = [request for request in distinct if isinstance(request, Generate)]
        encoded = self.encoder.pairs([p.question for p in pairs], [p.answer for p in pairs])
        prompts = self.encoder.prompts([g.question for g in asked]) if asked else []
        results: dict[Request, Result] = {}
        with evaluating(self.model), torch.no_grad():
            results.update(self._score(_share(list(zip(pairs, encoded, strict=True)))))
            results.update(self._generate(_share(list(zip(asked, prompts, strict=True)))))
        gathered = _gather(results)
        return {request: gathered[request] for request in distinct}

    def _score(
        self, pairs: Sequence[tuple[LogProb, Encoded]]
    ) -> Iterator[tuple[Request, LogProbResult]]:
        items = [Item(pair, pair[1].ids) for pair in pairs]
        with self._bar("scoring", len(items)) as bar:
            for batch in batches(items, self.token_budget):
                for part in halving(self._score_batch, [item.key for item in batch]):
                    yield from part
                    bar.update(len(part))

    def _score_batch(
        self, pairs: Sequence[tuple[LogProb, Encoded]]
    ) -> list[tuple[Request, LogProbResult]]:
        sequences = self._collator.sequences([(row, pair[1]) for row, pair in enumerate(pairs)])
        device = unwrapped(self.model).device
        tensors: dict[str, Any] = {**sequences}
        moved: Any = {key: value.to(device) for key, value in tensors.items()}
        scored = score(self.model, {"answer": moved})["answer"]
        assert scored.distribution is not None
        values = scored.distribution.map(_logp_and_greedy, scored.targets[scored.mask])  # (N, 2)
        lengths = scored.length.tolist()
        return [
            (
                request,
                LogProbResult(tuple(of_row[:, 0].tolist()), tuple(of_row[:, 1].bool().tolist())),
            )
            for (request, _), of_row in zip(pairs, values.cpu().split(lengths), strict=True)
        ]

    def _generate(
        self, prompts: Sequence[tuple[Generate, list[int]]]
    ) -> Iterator[tuple[Request, Generation]]:
        new_ids: dict[Generate, list[int]] = {request: [] for request, _ in prompts}
        open_rows = list(prompts)
        rest = self.max_new_tokens - FIRST_TOKENS
        limits = [FIRST_TOKENS, rest] if rest > 0 else [self.max_new_tokens]
        with self._bar("generating", len(prompts)) as bar:
            for limit in limits:
                for row, more in self._continue(open_rows, new_ids, limit):
                    new_ids[row] += more
                still_open = [row for row in open_rows if not self._has_ended(new_ids[row[0]])]
                bar.update(len(open_rows) - len(still_open))
                open_rows = still_open
            bar.update(len(open_rows))
        for request, ids in new_ids.items():
            yield request, self._generation(ids)

    def _continue(
        self,
        rows: Sequence[tuple[Generate, list[int]]],
        new_ids: dict[Generate, list[int]],
        limit: int,
    ) -> Iterator[tuple[Generate, list[int]]]:
        """Let each row go on for up to `limit` tokens, or to the end of the model's context."""
        config = unwrapped(self.model).config
        context = getattr(config, "max_position_embeddings", None)
        if self.max_total_tokens is not None:
            context = min(context or self.max_total_tokens, self.max_total_tokens)
        by_limit: dict[int, list[Item]] = {}
        for request, prompt in rows:
            ids = prompt + new_ids[request]
            room = limit if context is None else min(limit, context - len(ids))
            if room > 0:  # batches of one limit, so that no row is cut for its neighbours' sake
                by_limit.setdefault(room, []).append(Item(request, ids))
        for room, items in by_limit.items():

            def go_on(batch: Sequence[Item], room: int = room) -> list[tuple[Generate, list[int]]]:
                return self._generate_batch(batch, room)

            for batch in batches(items, self.generation_budget, extra=room):
                for part in halving(go_on, batch):
                    yield from part

    def _generate_batch(
        self, batch: Sequence[Item], limit: int
    ) -> list[tuple[Generate, list[int]]]:
        reversed_ids = [item.ids[::-1] for item in batch]  # the collator pads on the right
        ids = self._collator.pad(reversed_ids, self._collator.pad_id).flip(1)
        mask = self._collator.pad([[1] * len(item.ids) for item in batch], 0).flip(1)
        inner = unwrapped(self.model)
        device = inner.device
        known = inner.config.model_type in PLAIN_HEADS  # others may bring caches of their own
        generated = self.model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=greedy_config(limit, self._collator.pad_id, self._stop_ids),
            **({"past_key_values": roomy_cache(inner)} if known else {}),
        )
        return [
            (item.key, self._cut(row))
            for item, row in zip(batch, generated[:, ids.shape[1] :].tolist(), strict=True)
        ]

    def _cut(self, ids: list[int]) -> list[int]:
        """Keep the ids up to the first stop token; pads stand after it."""
        for position, token in enumerate(ids):
            if token in self._stop_ids:
                return ids[: position + 1]
        return ids

    def _has_ended(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] in self._stop_ids

    def _generation(self, ids: list[int]) -> Generation:
        tokenizer = self.encoder.tokenizer
        finished = self._has_ended(ids)
        kept = ids[:-1] if finished else ids
        text = str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
        return Generation(text, tuple(tokenizer.tokenize(text)), finished)

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Any]:
        with tqdm(total=total, desc=what, disable=not self.progress or not total) as bar:
            yield bar


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


def batches(items: Sequence[Item], budget: int, extra: int = 0) -> Iterator[list[Item]]:
    """Cut items, longest first, into batches of at most `budget` tokens with padding.

    Args:
        extra: Tokens that each row will get on top of its padded length.
    """
    # The longest first: what does not fit into memory shows at once and not at the end.
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    while ordered:
        width = -(-len(ordered[0].ids) // MULTIPLE) * MULTIPLE + extra
        rows = max(1, budget // width)
        yield ordered[:rows]
        ordered = ordered[rows:]


def halving(function: Callable[[Sequence[T]], list[Any]], batch: Sequence[T]) -> Iterator[Any]:
    """Call a function on a batch, or on ever smaller parts of it when memory runs out."""
    try:
        result = function(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    else:
        yield result
        return
    # Outside of the handler, which would keep the failed call's tensors alive.
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        yield from halving(function, half)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give every module its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _logp_and_greedy(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, and 1 where it is the first choice: (n, 2)."""
    chosen = logps.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack([chosen, (logps.argmax(-1) == targets).to(chosen.dtype)], dim=-1)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _share(items: list[tuple[T, Any]]) -> list[tuple[T, Any]]:
    """This process's part: every n-th of the items sorted by length, so that parts are alike."""
    if not _distributed():
        return items
    ordered = sorted(items, key=lambda item: _length(item[1]))
    return ordered[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _length(encoded: Encoded | list[int]) -> int:
    return len(encoded.ids if isinstance(encoded, Encoded) else encoded)


def _gather(results: dict[Request, Result]) -> dict[Request, Result]:
    if not _distributed():
        return results
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, results)
    return {request: result for part in parts for request, result in part.items()}
