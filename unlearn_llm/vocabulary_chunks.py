"""Walking through a vocabulary: logits by chunks of columns, running sums, gradients by chunk."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Size of one float32 chunk of (positions x columns), so that the peak is the same for any number
of positions. What is no larger is one chunk, and kept for the backward pass."""
CPU_CHUNK_BYTES = 16 * 2**20
"""On CPUs, where 8 to 16 MiB are 5% quicker than 64; GPUs would wait for the many small kernels."""


class Logits(NamedTuple):
    """Logits of N positions, not computed: what a linear head would make of hidden states."""

    hidden: Tensor
    """(N, H)."""
    weight: Tensor
    """(V, H)."""
    bias: Tensor | None
    """(V,)."""


class Lowered(NamedTuple):
    """One token of each position whose logit is made smaller."""

    tokens: Tensor
    """(N,) int64."""
    by: float


class Chunks:
    """Computes logits by chunks of columns, each in the memory of the one before.

    Attributes:
        kept: The logits of a single chunk, not to be computed again.
    """

    def __init__(
        self,
        logits: Logits,
        dtype: torch.dtype,
        kept: Tensor | None = None,
        among: int = 1,
        lowered: Lowered | None = None,
    ) -> None:
        """Choose the chunks; `among` of these objects share the memory of one."""
        self.dtype = dtype
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.hidden = logits.hidden.to(dtype)
        self.weight, self.bias = logits.weight, logits.bias
        self.kept = kept
        self.lowered = lowered
        self.n_rows, self.vocabulary = len(self.hidden), len(self.weight)
        self.columns = self.vocabulary
        most = CHUNK_BYTES // among // 4
        if self.n_rows * self.vocabulary > most:
            if self.hidden.device.type == "cpu":
                most = min(most, CPU_CHUNK_BYTES // among // 4)
            columns = most // self.n_rows
            self.columns = max(1, columns - columns % 64 if columns >= 64 else columns)  # aligned
        self._buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.vocabulary, self.columns):
            yield slice(start, min(start + self.columns, self.vocabulary))

    def logits(self, part: slice, keep: bool = False) -> Tensor:
        """(N, columns of the part) in the head's dtype; `keep` keeps them if they are all.

        Lowered ones are in the dtype of sums.
        """
        if self.kept is not None:
            return self.kept
        logits = self._buffer("logits", part, self.dtype)
        columns = self.rows_of_head(part).T
        if self.bias is None:
            torch.mm(self.hidden, columns, out=logits)
        else:
            torch.addmm(self.bias[part].to(self.dtype), self.hidden, columns, out=logits)
        if self.lowered is not None:
            if logits.dtype != self.sum_dtype:  # 8 bits would round what is left
                logits = self._buffer("lowered", part, self.sum_dtype).copy_(logits)
            lower(logits, self.lowered, part)
        if keep and self.columns == self.vocabulary:
            self.kept = logits
        return logits

    def exp(self, logits: Tensor, minus: Tensor, part: slice) -> Tensor:
        """Exponentials of differences in the dtype of sums; overwrites logits that are not kept."""
        in_place = self.kept is None and logits.dtype == self.sum_dtype
        out = logits if in_place else self._buffer("exp", part, self.sum_dtype)
        return torch.sub(logits, minus[:, None], out=out).exp_()

    def difference(self, others: Tensor, logits: Tensor, part: slice) -> Tensor:
        """(N, columns of the part) others - logits, in the dtype of sums."""
        out = self._buffer("difference", part, self.sum_dtype)
        return torch.sub(others.to(self.sum_dtype), logits, out=out)

    def rows_of_head(self, part: slice) -> Tensor:
        """(columns of the part, H) in the head's dtype."""
        return self.weight[part].to(self.dtype)

    def zeros(self) -> Tensor:
        """(N,) zeros in the dtype of sums."""
        return self.hidden.new_zeros(self.n_rows, dtype=self.sum_dtype)

    def _buffer(self, name: str, part: slice, dtype: torch.dtype) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = self.hidden.new_empty(self.n_rows * self.columns, dtype=dtype)
        width = part.stop - part.start
        return self._buffers[name][: self.n_rows * width].view(self.n_rows, width)


def columns_of(tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Column of each position's token within a chunk, and whether it is there; (N, 1) each."""
    inside = ((tokens >= part.start) & (tokens < part.stop))[:, None]
    return torch.where(inside, tokens[:, None] - part.start, 0), inside


def lower(logits: Tensor, lowered: Lowered, part: slice) -> None:
    """Lower what a chunk of logits has of the tokens, in place."""
    columns, inside = columns_of(lowered.tokens, part)
    logits.scatter_add_(1, columns, torch.where(inside, -lowered.by, 0.0).to(logits))


class RunningLogsumexp:
    """Sums exp(logits) over chunks, scaled by the largest logit so far."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self.total = chunks.zeros()
        # Finite, so that a first chunk of -inf is no difference of infinities.
        self.largest = self.total + torch.finfo(self.total.dtype).min

    def add(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Add a chunk; return its scaled exps, and the factor that rescales earlier sums."""
        largest = torch.maximum(self.largest, logits.amax(-1))
        shrink = torch.exp(self.largest - largest)
        exps = self.chunks.exp(logits, largest, part)
        self.total = self.total * shrink + exps.sum(-1)
        self.largest = largest
        return exps, shrink

    def value(self) -> Tensor:
        """(N,) logsumexp of all chunks."""
        return self.largest + self.total.log()


class Gradients:
    """Turns gradients of logits, chunk by chunk, into those of hidden states, weight and bias."""

    def __init__(self, chunks: Chunks, needed: Sequence[bool]) -> None:
        self.chunks = chunks
        hidden = torch.zeros_like(chunks.hidden, dtype=chunks.sum_dtype) if needed[0] else None
        weight = torch.empty_like(chunks.weight) if needed[1] else None
        bias = torch.empty_like(chunks.bias) if needed[2] and chunks.bias is not None else None
        self.of_inputs = hidden, weight, bias

    def add(self, grad: Tensor, part: slice) -> None:
        """Add the (N, columns of the part) gradient of a chunk of logits."""
        hidden, weight, bias = self.of_inputs
        if bias is not None:
            bias[part] = grad.sum(0)
        grad = grad.to(self.chunks.dtype)
        if hidden is not None:
            hidden += grad @ self.chunks.rows_of_head(part)
        if weight is None:
            return
        if weight.dtype == grad.dtype:
            torch.mm(grad.T, self.chunks.hidden, out=weight[part])
        else:
            weight[part] = grad.T @ self.chunks.hidden
