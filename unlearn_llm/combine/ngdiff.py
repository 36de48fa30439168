"""NGDiff: two gradients of length 1, and a learning rate read off the retain loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unlearn_llm.combine.base import COMBINATIONS, Step, Window, check_number
from unlearn_llm.combine.gradients import Projection, ngdiff
from unlearn_llm.combine.vectors import Coefficients, Gram
from unlearn_llm.errors import UserError

ROUNDING = 16 * torch.finfo(torch.float32).eps


def parabola_minimum(behind: float, here: float, ahead: float) -> float | None:
    """Give where the parabola through the losses at -1, 0 and 1 is lowest.

    None where that means nothing: not convex beyond the rounding of float32 losses, or downhill
    behind.

    Source: GeN, used by NGDiff, arXiv:2410.22086. Differs: its guard on the fit's R^2 > 0.99 says
        nothing of three points, through which every parabola goes; the rounding takes its place.
    """
    curvature = ahead + behind - 2 * here
    slope = behind - ahead
    if not (curvature > ROUNDING * abs(here) and slope > 0):  # nan is refused too
        return None
    return slope / (2 * curvature)


class NGDiff(Projection):
    """`ngdiff`; with `probe_every`, the learning rate follows the retain loss.

    Every `probe_every` steps the retain loss of the step's rows is taken after the step and at the
    mirror image of the step: with the loss before, a parabola. Its minimum, at most a factor 2
    away, moves the learning rate by 1 - `smoothing` of the way; the step is then lengthened or
    shortened to the new rate. Later steps multiply the scheduled rate by what has accumulated.

    Source: NGDiff, arXiv:2410.22086; gen-optim 0.1.1. Differs: the moments of the optimiser are
        updated once (the package steps, restores the weights, and steps again with moments that
        have seen the gradient already): p is read off the real step, weight decay included, which
        is linear in the rate. Two copies of the weights during a probe.
    """

    def __init__(self, *, probe_every: int | None = None, smoothing: float = 0.9) -> None:
        super().__init__()
        is_count = isinstance(probe_every, int) and not isinstance(probe_every, bool)
        if probe_every is not None and not (is_count and probe_every > 0):
            raise UserError(f"probe_every: expected a number of steps, got {probe_every!r}.")
        self.probe_every = probe_every
        self.smoothing = check_number("smoothing", smoothing, least=0.0, most=1.0)
        self.scale = 1.0
        self._start: list[Tensor] | None = None

    def coefficients(self, products: Gram) -> Coefficients:
        """See `ngdiff`."""
        return ngdiff(products)

    def wants_loss_before(self, step: int) -> bool:
        """Probes compare losses."""
        return self.probe_every is not None and step % self.probe_every == 0

    def learning_rate_scale(self) -> float:
        """What the probes have made of the rate."""
        return self.scale

    def before_step(self, step: int, window: Window) -> None:
        """Keep the weights that a probe starts from."""
        if self.wants_loss_before(step):
            self._start = [parameter.detach().clone() for parameter in window.parameters]

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Probe, where it was prepared."""
        if self._start is None:
            return
        start, self._start = self._start, None
        window = step.window
        end = [parameter.detach().clone() for parameter in window.parameters]
        ahead = window.loss("retain")
        _place(window.parameters, start, end, -1.0)
        behind = window.loss("retain")
        best = parabola_minimum(behind, step.losses["retain"], ahead)
        factor = 1.0
        if best is not None:
            factor = self.smoothing + (1 - self.smoothing) * min(2.0, max(0.5, best))
        self.scale *= factor
        _place(window.parameters, start, end, factor)

    def observations(self) -> dict[str, float]:
        """Those of a projection, and what the rate is multiplied by."""
        scale = {} if self.probe_every is None else {"combine/learning_rate_scale": self.scale}
        return super().observations() | scale

    def state_dict(self) -> dict[str, Any]:
        """What the rate is multiplied by."""
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a scale."""
        self.scale = state["scale"]


def _place(
    parameters: list[Tensor], start: list[Tensor], end: list[Tensor], position: float
) -> None:
    """Set parameters to the point of the line that is `start` at 0 and `end` at 1, exactly."""
    for parameter, one, other in zip(parameters, start, end, strict=True):
        if position == 1.0:
            parameter.copy_(other)
        else:
            parameter.copy_(one).add_(other - one, alpha=position)


COMBINATIONS.add("ngdiff", NGDiff)
