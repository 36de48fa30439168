"""What losses need of logits, without the logits: from hidden states and a linear output head.

The vocabulary is walked through in chunks, with a running logsumexp. The backward pass computes
each chunk again and writes each row of the head's gradient once. So (positions x vocabulary) is
never in memory, unless it is one chunk, and nothing of the head's size is but that gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class LogitStatistics(NamedTuple):
    """Numbers of each position's logits, (N,) each; float32, or float64 for float64 logits."""

    target: Tensor
    """The logit of the target token."""
    logsumexp: Tensor
    mean: Tensor


def logit_statistics(logits: Logits, targets: Tensor) -> LogitStatistics:
    """Compute what log-probabilities and the divergence from uniform are made of.

    log p(target) is `target - logsumexp`, and KL(uniform || model) is `logsumexp - mean - log V`.

    Args:
        targets: (N,) int64.

    Source: running logsumexp: Milakov & Gimelshein 2018, arXiv:1805.02867.
    Differs: over chunks, computed again in the backward pass unless one chunk holds them all.
    """
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Statistics.apply
    dtype, keep = _dtype_of_head(logits), torch.is_grad_enabled()
    return LogitStatistics(*apply(*logits, targets, dtype, keep))


def kl_divergence(reference: Logits, policy: Logits) -> Tensor:
    """Compute KL(reference || policy) of each position, (N,). The reference is a constant.

    Source: sum q (log q - log p), which is E_q[z_q - z_p] - logsumexp z_q + logsumexp z_p.
    Differs: over chunks, computed again in the backward pass unless one chunk holds them all.
    """
    constant = [None if tensor is None else tensor.detach() for tensor in reference]
    dtypes = _dtype_of_head(policy), _dtype_of_head(reference)
    apply: Callable[..., Tensor] = _KLDivergence.apply
    return apply(*policy, *constant, dtypes, torch.is_grad_enabled())


def _dtype_of_head(logits: Logits) -> torch.dtype:
    """The dtype in which the head itself would multiply here."""
    device, dtype = logits.weight.device.type, logits.weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


class _Statistics(torch.autograd.Function):
    """Target logit, logsumexp and mean of N positions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _Chunks(Logits(hidden, weight, bias), dtype)
        running = _RunningLogsumexp(chunks)
        chosen, total = chunks.zeros(), chunks.zeros()
        for part in chunks:
            logits = chunks.logits(part, keep)
            columns, inside = _columns(targets, part)
            chosen = torch.where(inside, logits.gather(1, columns).squeeze(1), chosen)
            total += logits.sum(-1, dtype=total.dtype)
            running.add(logits, part)
        logsumexp = running.value()
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, chunks.kept)
        ctx.dtype = dtype
        return chosen, logsumexp, total / chunks.vocabulary

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, target_grad: Tensor, logsumexp_grad: Tensor, mean_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp, kept = ctx.saved_tensors
        chunks = _Chunks(Logits(hidden, weight, bias), ctx.dtype, kept)
        grads = _Gradients(chunks, ctx.needs_input_grad)
        for part in chunks:
            # The softmax times its gradient; then what the target and the mean add to it.
            grad = chunks.exp(chunks.logits(part), logsumexp, part)
            grad *= logsumexp_grad[:, None]
            grad += (mean_grad / chunks.vocabulary)[:, None]
            columns, inside = _columns(targets, part)
            grad.scatter_add_(1, columns, (target_grad * inside)[:, None])
            grads.add(grad, part)
        return *grads.of_inputs, None, None, None


class _KLDivergence(torch.autograd.Function):
    """KL(reference || policy) of N positions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        keep: bool,
    ) -> Tensor:
        ours = _Chunks(Logits(hidden, weight, bias), dtypes[0], among=2)
        constant = Logits(reference_hidden, reference_weight, reference_bias)
        theirs = _Chunks(constant, dtypes[1], among=2)
        policy, reference = _RunningLogsumexp(ours), _RunningLogsumexp(theirs)
        weighted = ours.zeros()  # the sum of exp(z_q) (z_q - z_p), scaled as reference.total is
        for part in ours:
            logits, reference_logits = ours.logits(part, keep), theirs.logits(part, keep)
            difference = ours.difference(reference_logits, logits, part)
            policy.add(logits, part)
            exps, shrink = reference.add(reference_logits, part)
            weighted = weighted * shrink + exps.mul_(difference).sum(-1)
        logsumexp, reference_logsumexp = policy.value(), reference.value()
        ctx.save_for_backward(
            hidden, weight, bias, *constant, logsumexp, reference_logsumexp, ours.kept, theirs.kept
        )
        ctx.dtypes = dtypes
        return weighted / reference.total - reference_logsumexp + logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, divergence_grad: Tensor) -> tuple[Tensor | None, ...]:
        logsumexp, reference_logsumexp, kept, reference_kept = ctx.saved_tensors[6:]
        policy, reference = Logits(*ctx.saved_tensors[:3]), Logits(*ctx.saved_tensors[3:6])
        ours = _Chunks(policy, ctx.dtypes[0], kept, among=2)
        theirs = _Chunks(reference, ctx.dtypes[1], reference_kept, among=2)
        grads = _Gradients(ours, ctx.needs_input_grad)
        for part in ours:
            grad = ours.exp(ours.logits(part), logsumexp, part)
            grad -= theirs.exp(theirs.logits(part), reference_logsumexp, part)
            grad *= divergence_grad[:, None]
            grads.add(grad, part)
        return *grads.of_inputs, None, None, None, None, None


def _columns(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Column of each target within a chunk, (N, 1), and whether it is there, (N,)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return torch.where(inside, targets - part.start, 0)[:, None], inside


class _Chunks:
    """Computes logits by chunks of columns, each in the memory of the one before.

    Attributes:
        kept: The logits of a single chunk, not to be computed again.
    """

    def __init__(
        self, logits: Logits, dtype: torch.dtype, kept: Tensor | None = None, among: int = 1
    ) -> None:
        """Choose the chunks; `among` of these objects share the memory of one."""
        self.dtype = dtype
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.hidden = logits.hidden.to(dtype)
        self.weight, self.bias = logits.weight, logits.bias
        self.kept = kept
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
        """(N, columns of the part) in the head's dtype; `keep` keeps them if they are all."""
        if self.kept is not None:
            return self.kept
        logits = self._buffer("logits", part, self.dtype)
        columns = self.rows_of_head(part).T
        if self.bias is None:
            torch.mm(self.hidden, columns, out=logits)
        else:
            torch.addmm(self.bias[part].to(self.dtype), self.hidden, columns, out=logits)
        if keep and self.columns == self.vocabulary:
            self.kept = logits
        return logits

    def exp(self, logits: Tensor, minus: Tensor, part: slice) -> Tensor:
        """Exponentials of differences in the dtype of sums; overwrites logits that are not kept."""
        in_place = self.kept is None and self.dtype == self.sum_dtype
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


class _RunningLogsumexp:
    """Sums exp(logits) over chunks, scaled by the largest logit so far."""

    def __init__(self, chunks: _Chunks) -> None:
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


class _Gradients:
    """Turns gradients of logits, chunk by chunk, into those of hidden states, weight and bias."""

    def __init__(self, chunks: _Chunks, needed: Sequence[bool]) -> None:
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
