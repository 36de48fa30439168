"""Puts requests to a model: each distinct one once, in batches, on every rank, resumably.

What the answers mean is the metrics' business. Nothing here depends on how requests fall into
batches, except for rounding.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.utils import logging

from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.batching import Item, batches, evaluating, halving
from unlearn_llm.evaluation.generator import Generator
from unlearn_llm.evaluation.gradients import Gradients
from unlearn_llm.evaluation.journal import Journal, digest, key_of
from unlearn_llm.evaluation.provenance import describe_model
from unlearn_llm.evaluation.readings import READINGS
from unlearn_llm.evaluation.requests import Generate, GradientNorm, LogProb, Request, Result
from unlearn_llm.evaluation.scorer import Scorer
from unlearn_llm.scoring import unwrapped


class Asker(Protocol):
    """Answers one kind of request."""

    what: str
    budget: int
    extra: int

    def items(self, requests: Sequence[Any]) -> list[Item]:
        """Make rows of requests."""
        ...

    def requests_of(self, item: Item) -> Sequence[Request]:
        """Give the requests that a row answers."""
        ...

    def answer(self, batch: Sequence[Item]) -> list[Any]:
        """Ask the model with the rows of one batch: pairs of request and result."""
        ...


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
        self._encoder = encoder
        tokenizer = encoder.tokenizer
        named = tokenizer.pad_token_id
        pad_id = int(tokenizer.eos_token_id if named is None else named)
        self._generator = Generator(
            self.model, encoder, pad_id, generation_budget, max_new_tokens, max_total_tokens
        )
        self._askers: dict[type[Request], Asker] = {
            kind: Scorer(self.model, encoder, pad_id, token_budget, reading)
            for kind, reading in READINGS.items()
        }
        self._askers[Generate] = self._generator
        self._askers[GradientNorm] = Gradients(self.model, encoder, pad_id)
        self._limits = {"max_new_tokens": max_new_tokens, "max_total_tokens": max_total_tokens}
        if progress is None:
            progress = sys.stderr.isatty() and logging.is_progress_bar_enabled()
        self.progress = progress

    def describe(self) -> dict[str, Any]:
        """Name the model and how it is asked; see describe_model."""
        return describe_model(self.model, self._encoder)

    def origin(self, requests: Iterable[Request]) -> dict[str, Any]:
        """Say what answers depend on besides model and tokenizer; see Journal."""
        inner = unwrapped(self.model)
        return {
            "questions": digest([key_of(request) for request in dict.fromkeys(requests)]),
            **self._limits,
            "stop_ids": sorted(self._generator.stop_ids),
            # Rounding, and what bfloat16 makes of it.
            "batches": [self._askers[LogProb].budget, self._generator.budget],
            "device": inner.device.type,
            "attention": inner.config._attn_implementation,
        }

    def run(
        self, requests: Iterable[Request], journal: Journal | None = None
    ) -> dict[Request, Result]:
        """Answer every distinct request.

        With several processes (torch.distributed is initialised) each answers its share, and all
        of them get all the answers; every process must be given the same requests.

        Args:
            journal: What it holds is not asked again; what is asked is added.

        Raises:
            UserError: a question or an answer that cannot be encoded.
        """
        distinct = list(dict.fromkeys(requests))
        asked = [
            (asker, asker.items([request for request in distinct if isinstance(request, kind)]))
            for kind, asker in self._askers.items()
        ]
        results: dict[Request, Result] = {}
        with evaluating(self.model), torch.no_grad():
            for asker, items in asked:
                results.update(self._answers(asker, _share(items), journal))
        gathered = _gather(results)
        return {request: gathered[request] for request in distinct}

    def _answers(
        self, asker: Asker, items: Sequence[Item], journal: Journal | None
    ) -> Iterator[tuple[Request, Result]]:
        requests = [request for item in items for request in asker.requests_of(item)]
        known = journal.known(requests) if journal else {}
        yield from known.items()
        with tqdm(
            total=len(requests),
            initial=len(known),
            desc=asker.what,
            disable=not self.progress or not requests,
        ) as bar:
            for batch in batches(items, asker.budget, asker.extra):
                # An interrupted run stopped between batches: all of one are missing, or none.
                missing = [item for item in batch if set(asker.requests_of(item)) - known.keys()]
                for part in halving(asker.answer, missing) if missing else ():
                    if journal:
                        journal.add(part)
                    yield from part
                    bar.update(len(part))


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _share(items: list[Item]) -> list[Item]:
    """This process's part: every n-th of the items sorted by length, so that parts are alike."""
    if not _distributed():
        return items
    ordered = sorted(items, key=lambda item: len(item.ids))
    return ordered[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _gather(results: dict[Request, Result]) -> dict[Request, Result]:
    if not _distributed():
        return results
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, results)
    return {request: result for part in parts for request, result in part.items()}
