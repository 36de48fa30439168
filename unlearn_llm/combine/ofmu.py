"""OFMU: steps of forgetting inside a step of retaining, with penalties by finite differences."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unlearn_llm.combine.base import COMBINATIONS, Combination, Window, check_number
from unlearn_llm.combine.vectors import Gradient, dots, gram, inverse
from unlearn_llm.errors import UserError
from unlearn_llm.types import Role


class OFMU(Combination):
    """Forgets in inner steps, retains in the outer one, and penalises what is left to forget.

    With h = l_f - beta cos(g_f, g_r), that is -Phi of the paper: `inner_steps` times
    theta <- theta - inner_rate grad h; then the optimiser steps from there against
    g_r + 2 rho H grad h; then rho <- min(rho_max, growth * rho).

    Where the paper is silent (no code, no values): the outer gradient is taken at the inner
    iterate and the optimiser moves from there, without which the inner steps would do nothing;
    H is the Hessian of the forget loss alone, without third derivatives of the cosine; products
    with Hessians are central differences over `difference` of the weights' norm (fused attention
    has no second derivative); `rho_max`; all defaults. Weights are put back where the direction is
    not finite.

    A step makes 6 inner_steps + 9 backward passes; with beta=0, inner_steps + 4.

    Source: OFMU, arXiv:2509.22483, as quoted in its reviews. Differs: the forget loss may be any
        that is minimised, where the paper maximises the likelihood's negative; and as above.
    """

    gradients = True
    repeatable = True

    def __init__(
        self,
        *,
        inner_steps: int = 5,
        inner_rate: float = 1e-3,
        beta: float = 0.1,
        rho: float = 1e-3,
        growth: float = 1.01,
        rho_max: float = 1.0,
        difference: float = 1e-3,
    ) -> None:
        if not isinstance(inner_steps, int) or isinstance(inner_steps, bool) or inner_steps < 0:
            raise UserError(f"inner_steps: expected a whole number >= 0, got {inner_steps!r}.")
        self.inner_steps = inner_steps
        self.inner_rate = check_number("inner_rate", inner_rate, least=0.0)
        self.beta = check_number("beta", beta, least=0.0)
        self.growth = check_number("growth", growth, least=1.0)
        self.rho_max = check_number("rho_max", rho_max, least=0.0)
        self.rho = check_number("rho", rho, least=0.0, most=self.rho_max)
        self.difference = check_number("difference", difference, least=1e-6, most=0.1)
        self._seen: dict[str, float] = {}

    def combine(self, window: Window) -> Gradient:
        """Make the inner steps and give the gradient of the outer one."""
        start = _copy(window.parameters)
        for _ in range(self.inner_steps):
            _move(window.parameters, self._inner_gradient(window), -self.inner_rate)
        left = self._inner_gradient(window)
        penalty = self._hessian_product(window, "forget", left)
        (norm,) = dots([(left, left)], window.reduce)
        del left
        direction = window.gradient("retain")
        _move(direction, penalty, 2 * self.rho)
        (length,) = dots([(direction, direction)], window.reduce)
        if not math.isfinite(length):
            _set(window.parameters, start)
        self._seen["combine/rho"] = self.rho
        self._seen["combine/inner_grad_norm"] = math.sqrt(norm)
        self.rho = min(self.rho_max, self.growth * self.rho)
        return direction

    def observations(self) -> dict[str, float]:
        """Rho, the norm of what is left to forget, the cosine where it was needed."""
        return dict(self._seen)

    def state_dict(self) -> dict[str, Any]:
        """Rho."""
        return {"rho": self.rho}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a rho."""
        self.rho = state["rho"]

    def _inner_gradient(self, window: Window) -> Gradient:
        """Gradient of h: g_f - beta (H_f dc/dg_f + H_r dc/dg_r), c the cosine."""
        forget = window.gradient("forget")
        if self.beta == 0:
            return forget
        retain = window.gradient("retain")
        products = gram(forget, retain, window.reduce)
        self._seen["combine/cosine"] = products.cosine
        across = inverse(math.sqrt(products.forget)) * inverse(math.sqrt(products.retain))
        by_forget = _blend(across, retain, -products.cosine * inverse(products.forget), forget)
        by_retain = _blend(across, forget, -products.cosine * inverse(products.retain), retain)
        del retain
        _move(forget, self._hessian_product(window, "forget", by_forget), -self.beta)
        del by_forget
        _move(forget, self._hessian_product(window, "retain", by_retain), -self.beta)
        return forget

    def _hessian_product(self, window: Window, role: Role, vector: Gradient) -> Gradient:
        """Central difference of a role's gradient along a vector."""
        weights = window.parameters
        length, size = map(math.sqrt, dots([(vector, vector), (weights, weights)], window.reduce))
        distance = self.difference * size * inverse(length)
        here = _copy(weights)
        _move(weights, vector, distance)
        ahead = window.gradient(role)
        _set(weights, here)
        _move(weights, vector, -distance)
        behind = window.gradient(role)
        _set(weights, here)
        scale = inverse(2 * distance)
        for tensor, other in zip(ahead, behind, strict=True):
            tensor.sub_(other).mul_(scale)
        return ahead


def _copy(tensors: Gradient) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _blend(a: float, one: Gradient, b: float, other: Gradient) -> list[Tensor]:
    return [(a * s).add_(t, alpha=b) for s, t in zip(one, other, strict=True)]


@torch.no_grad()
def _move(tensors: Gradient, along: Gradient, distance: float) -> None:
    for tensor, direction in zip(tensors, along, strict=True):
        tensor.add_(direction, alpha=distance)


@torch.no_grad()
def _set(tensors: Gradient, values: Gradient) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


COMBINATIONS.add("ofmu", OFMU)
