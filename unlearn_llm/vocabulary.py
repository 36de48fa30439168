"""What losses need of logits, without the logits: from hidden states and a linear output head.

The vocabulary is walked through in chunks, with a running logsumexp. The backward pass computes
each chunk again and writes each row of the head's gradient once. So (positions x vocabulary) is
never in memory, unless it is one chunk, and nothing of the head's size is but that gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unlearn_llm.vocabulary_chunks import (
    Chunks,
    Gradients,
    Logits,
    Lowered,
    RunningLogsumexp,
    columns_of,
    lower,
)


class LogitStatistics(NamedTuple):
    """Numbers of each position's logits, (N,) each; float32, or float64 for float64 logits."""

    target: Tensor
    """The logit of the target token."""
    others: Tensor
    """logsumexp of all logits but the target's."""
    logsumexp: Tensor
    mean: Tensor


def logit_statistics(logits: Logits, targets: Tensor) -> LogitStatistics:
    """Compute what log-probabilities, log-odds and the divergence from uniform are made of.

    log p(target) is `target - logsumexp`, log p/(1-p) is `target - others`, and KL(uniform ||
    model) is `logsumexp - mean - log V`.

    Args:
        targets: (N,) int64.

    Source: running logsumexp: Milakov & Gimelshein 2018, arXiv:1805.02867.
    Differs: over chunks, computed again in the backward pass unless one chunk holds them all.
    """
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Statistics.apply
    dtype, keep = _dtype_of_head(logits), torch.is_grad_enabled()
    target, others, mean = apply(*logits, targets, dtype, keep)
    return LogitStatistics(target, others, torch.logaddexp(others, target), mean)


def logit_margin(logits: Logits) -> Tensor:
    """Compute how far each position's largest logit is above their mean, (N,).

    Of several largest logits the first is taken, in the gradient too.

    Source: PDU, arXiv:2506.05314, where it is squared.
    Differs: the gradient comes from the head's rows at the largest and on average, so that the
        backward pass computes no logits.
    """
    apply: Callable[..., Tensor] = _Margin.apply
    return apply(*logits, _dtype_of_head(logits))


def kl_divergence(reference: Logits, policy: Logits) -> Tensor:
    """Compute KL(reference || policy) of each position, (N,). The reference is a constant.

    Source: sum q (log q - log p), which is E_q[z_q - z_p] - logsumexp z_q + logsumexp z_p.
    Differs: over chunks, computed again in the backward pass unless one chunk holds them all.
    """
    return _diverge(reference, policy, None)


def cross_entropy(reference: Logits, policy: Logits, lowered: Lowered) -> Tensor:
    """Compute -sum q log p of each position, (N,). The reference is a constant.

    q is the reference's softmax with one logit of each position lowered.

    Source: UNDIAL, arXiv:2402.10052; it is logsumexp z_p - E_q[z_p].
    Differs: over chunks, computed again in the backward pass unless one chunk holds them all.
    """
    return _diverge(reference, policy, lowered)


def _diverge(reference: Logits, policy: Logits, lowered: Lowered | None) -> Tensor:
    constant = [None if tensor is None else tensor.detach() for tensor in reference]
    dtypes = _dtype_of_head(policy), _dtype_of_head(reference)
    apply: Callable[..., Tensor] = _Divergence.apply
    return apply(*policy, *constant, *(lowered or (None, None)), dtypes, torch.is_grad_enabled())


def _dtype_of_head(logits: Logits) -> torch.dtype:
    """The dtype in which the head itself would multiply here."""
    device, dtype = logits.weight.device.type, logits.weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


class _Statistics(torch.autograd.Function):
    """Target logit, logsumexp of the others and mean of N positions."""

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
        chunks = Chunks(Logits(hidden, weight, bias), dtype)
        running = RunningLogsumexp(chunks)
        target, total = chunks.zeros(), chunks.zeros()
        for part in chunks:
            logits = chunks.logits(part, keep)
            columns, inside = columns_of(targets, part)
            target = torch.where(inside, logits.gather(1, columns), target[:, None]).squeeze(1)
            total += logits.sum(-1, dtype=total.dtype)
            lower(logits, Lowered(targets, math.inf), part)
            running.add(logits, part)
        others = running.value()
        ctx.save_for_backward(hidden, weight, bias, targets, others, chunks.kept)
        ctx.dtype = dtype
        return target, others, total / chunks.vocabulary

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, target_grad: Tensor, others_grad: Tensor, mean_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, others, kept = ctx.saved_tensors
        without_target = Lowered(targets, math.inf)
        chunks = Chunks(Logits(hidden, weight, bias), ctx.dtype, kept, lowered=without_target)
        grads = Gradients(chunks, ctx.needs_input_grad)
        for part in chunks:
            # The softmax of the others times its gradient; then what target and mean add to it.
            grad = chunks.exp(chunks.logits(part), others, part)
            grad *= others_grad[:, None]
            grad += (mean_grad / chunks.vocabulary)[:, None]
            columns, inside = columns_of(targets, part)
            grad.scatter_add_(1, columns, target_grad[:, None] * inside)
            grads.add(grad, part)
        return *grads.of_inputs, None, None, None


class _Margin(torch.autograd.Function):
    """Largest logit minus mean of N positions."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        chunks = Chunks(Logits(hidden, weight, bias), dtype)
        total = chunks.zeros()
        largest = total + torch.finfo(total.dtype).min
        tokens = torch.zeros_like(total, dtype=torch.int64)
        row_total = weight.new_zeros(weight.shape[1], dtype=chunks.sum_dtype)
        for part in chunks:
            logits = chunks.logits(part)
            values, columns = logits.max(-1)
            tokens = torch.where(values > largest, columns + part.start, tokens)
            largest = torch.maximum(values, largest)
            total += logits.sum(-1, dtype=total.dtype)
            row_total += weight[part].sum(0, dtype=row_total.dtype)
        mean_row = row_total / chunks.vocabulary
        ctx.save_for_backward(hidden, weight, bias, tokens, mean_row)
        return largest - total / chunks.vocabulary

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, margin_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, mean_row = ctx.saved_tensors
        needed, grad = ctx.needs_input_grad, margin_grad[:, None]
        hidden_grad = weight_grad = bias_grad = None
        if needed[0]:
            hidden_grad = grad * (weight[tokens] - mean_row)
        if needed[1]:
            weight_grad = _above_mean(grad * hidden, tokens, weight)
        if needed[2] and bias is not None:
            bias_grad = _above_mean(grad, tokens, bias[:, None]).squeeze(1)
        return hidden_grad, weight_grad, bias_grad, None


def _above_mean(values: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
    """Add (N, K) values up by token, less the mean over the vocabulary of (V, K); like a tensor."""
    mean = values.sum(0) / len(like)
    chosen, places = torch.unique(tokens, return_inverse=True)
    sums = values.new_zeros(len(chosen), values.shape[1]).index_add_(0, places, values)
    # Rounded to the dtype of `like` once, and nothing else is of its size.
    result = torch.empty_like(like).copy_(-mean)
    result[chosen] = (sums - mean).to(like.dtype)
    return result


class _Divergence(torch.autograd.Function):
    """KL(reference || policy) of N positions; cross-entropy where the reference is lowered."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
        tokens: Tensor | None,
        by: float | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        keep: bool,
    ) -> Tensor:
        constant = Logits(reference_hidden, reference_weight, reference_bias)
        lowered = None if tokens is None or by is None else Lowered(tokens, by)
        ours = Chunks(Logits(hidden, weight, bias), dtypes[0], among=2)
        theirs = Chunks(constant, dtypes[1], among=2, lowered=lowered)
        policy, reference = RunningLogsumexp(ours), RunningLogsumexp(theirs)
        weighted = ours.zeros()  # sum of exp(z_q) z_p, or (z_p - z_q); scaled like reference.total
        for part in ours:
            logits, reference_logits = ours.logits(part, keep), theirs.logits(part, keep)
            compared = logits if lowered else ours.difference(logits, reference_logits, part)
            exps, shrink = reference.add(reference_logits, part)
            weighted = weighted * shrink + exps.mul_(compared).sum(-1)
            policy.add(logits, part)  # which may overwrite them
        logsumexp, reference_logsumexp = policy.value(), reference.value()
        ctx.save_for_backward(
            *(hidden, weight, bias, *constant, tokens),
            *(logsumexp, reference_logsumexp, ours.kept, theirs.kept),
        )
        ctx.dtypes, ctx.by = dtypes, by
        cross_entropy = logsumexp - weighted / reference.total
        return cross_entropy if lowered else cross_entropy - reference_logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, divergence_grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, logsumexp, reference_logsumexp, kept, reference_kept = ctx.saved_tensors[6:]
        policy, reference = Logits(*ctx.saved_tensors[:3]), Logits(*ctx.saved_tensors[3:6])
        lowered = None if tokens is None else Lowered(tokens, ctx.by)
        ours = Chunks(policy, ctx.dtypes[0], kept, among=2)
        theirs = Chunks(reference, ctx.dtypes[1], reference_kept, among=2, lowered=lowered)
        grads = Gradients(ours, ctx.needs_input_grad)
        for part in ours:
            grad = ours.exp(ours.logits(part), logsumexp, part)
            grad -= theirs.exp(theirs.logits(part), reference_logsumexp, part)
            grad *= divergence_grad[:, None]
            grads.add(grad, part)
        return *grads.of_inputs, None, None, None, None, None, None, None
