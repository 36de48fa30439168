"""How strongly one row would change a model: the norms of its gradients, one row at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.batching import Item
from unlearn_llm.evaluation.requests import GradientNorm, GradientNormResult, Request
from unlearn_llm.scoring import score, unwrapped
from unlearn_llm.types import Sequences


class Gradients:
    """Asks one model for the norms of its gradients, one row at a time.

    Attributes:
        budget, extra: See batches; no second row fits.
    """

    what = "gradients"
    budget = 1
    extra = 0

    def __init__(self, model: nn.Module, encoder: Encoder, pad_id: int) -> None:
        self.model = model
        self.encoder = encoder
        self._collator = Collator(pad_id)

    def items(self, requests: Sequence[GradientNorm]) -> list[Item]:
        """Make a row of each request.

        Raises:
            UserError: a question or an answer that cannot be encoded.
        """
        encoded = self.encoder.pairs([r.question for r in requests], [r.answer for r in requests])
        return [Item((r, e), e.ids) for r, e in zip(requests, encoded, strict=True)]

    def requests_of(self, item: Item) -> Sequence[Request]:
        """Give the requests that a row answers."""
        return [item.key[0]]

    def answer(self, batch: Sequence[Item]) -> list[tuple[Request, GradientNormResult]]:
        """Take the gradient of every row."""
        device = unwrapped(self.model).device
        answers: list[tuple[Request, GradientNormResult]] = []
        for request, encoded in (item.key for item in batch):
            tensors: dict[str, Any] = {**self._collator.sequences([(0, encoded)])}
            sequences: Any = {name: tensor.to(device) for name, tensor in tensors.items()}
            norm = gradient_norm(self.model, sequences)
            answers.append((request, GradientNormResult(norm)))
        return answers


def gradient_norm(model: nn.Module, sequences: Sequences) -> float:
    """Mean over the weight tensors of the 2-norm of the gradient of the mean loss per token.

    Every tensor counts that the loss depends on, trainable or not, but no adapter's: the gradient
    of a weight below an adapter is that of the merged weight. No gradient is kept: each is
    reduced to its norm as soon as it is complete, so a pass needs the memory of one tensor more.

    Args:
        model: In the mode it shall be measured in; see batching.evaluating.
        sequences: One row (1, T), on the model's device.

    Raises:
        UserError: a weight is stored in integers (4 or 8 bits), which have no gradient.
    """
    norms: list[Tensor] = []
    with torch.enable_grad(), _norms_of_gradients(model, norms):
        scored = score(model, {"answer": sequences})["answer"]
        (-scored.logp / scored.length).sum().backward()
    return float(torch.stack(norms).mean())


def _own_weights(model: nn.Module) -> list[nn.Parameter]:
    """List the weights of the model below its adapters."""
    adapter = str(model.base_model.prefix) if isinstance(model, PeftModel) else None
    weights = [p for name, p in model.named_parameters() if not (adapter and adapter in name)]
    if not all(weight.is_floating_point() for weight in weights):
        raise UserError(
            "Gradient norms need weights in floating point, and this model has quantised ones: "
            "leave mia_gradnorm out of the suite's metrics, or load the model unquantised."
        )
    return weights


@contextmanager
def _norms_of_gradients(model: nn.Module, norms: list[Tensor]) -> Iterator[None]:
    """Let every backward pass in here put norms into the list, in place of gradients."""

    def reduce(weight: Tensor) -> None:
        assert weight.grad is not None
        norms.append(weight.grad.float().norm())
        weight.grad = None

    own = _own_weights(model)
    kept = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    hooks = []
    try:
        for weight, _, _ in kept:
            weight.requires_grad_(False)
            weight.grad = None
        for weight in own:
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(reduce))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, trainable, gradient in kept:
            weight.requires_grad_(trainable)
            weight.grad = gradient
