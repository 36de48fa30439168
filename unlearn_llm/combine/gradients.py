"""Combinations of two gradients: the formulas on their products, and the classes named in recipes.

In all of them g_f is the gradient of the forget loss that is minimised, g_r that of the retain
loss, and the optimiser steps against the result.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from unlearn_llm.combine.base import COMBINATIONS, Combination, Window, check_number
from unlearn_llm.combine.vectors import (
    Coefficients,
    Gradient,
    Gram,
    Reduce,
    blend,
    dots,
    gram,
    inverse,
    whole,
)
from unlearn_llm.errors import UserError

Normalize = Literal["none", "l2"]


def surgery(products: Gram, *, eps: float = 0.0) -> Coefficients:
    """Give the direction nearest to g_f that raises the retain loss by at most eps.

    The solution of min |d - g_f|^2 subject to <g_r, d> >= -eps: to first order the retain loss
    rises by at most the learning rate times eps. Without conflict it is g_f alone, so the retain
    loss is guarded and not trained.

    Source: EUPMU, arXiv:2510.22124, Prop. 3.2. Differs: |g_r|^2 is not raised by 1e-8, which
        would weaken the guarantee for small gradients; where g_r is zero the result is g_f.
    """
    lam = max(0.0, -products.cross - eps) * inverse(products.retain)
    return Coefficients(1.0, lam)


def pcgrad(products: Gram) -> Coefficients:
    """Project each gradient off the other where they conflict, and add the two.

    The result conflicts with neither: <d, g_f> >= 0 and <d, g_r> >= 0.

    Source: PCGrad, arXiv:2001.06782, alg. 1. Differs: with two tasks the order does not matter,
        for each is projected against the other's original.
    """
    if products.cross >= 0:
        return Coefficients(1.0, 1.0)
    return Coefficients(
        1 - products.cross * inverse(products.forget),
        1 - products.cross * inverse(products.retain),
    )


def mgda(products: Gram, *, normalize: Normalize = "none") -> Coefficients:
    """Give the shortest vector between the two gradients.

    Near a Pareto point it vanishes; the smaller gradient dominates. With normalize="l2" both have
    length 1 before, and the result is half of `ngdiff`.

    Source: MGDA, arXiv:1810.04650, closed form for two tasks. Differs: no difference.
    """
    lengths = Coefficients(1.0, 1.0)
    if normalize == "l2":
        lengths = ngdiff(products)
        products = Gram(
            products.forget * lengths.forget**2,
            products.cross * lengths.forget * lengths.retain,
            products.retain * lengths.retain**2,
        )
    apart = products.forget + products.retain - 2 * products.cross  # |g_f - g_r|^2
    share = 0.5 if apart <= 0 else (products.retain - products.cross) / apart
    share = min(1.0, max(0.0, share))
    return Coefficients(share * lengths.forget, (1 - share) * lengths.retain)


def ngdiff(products: Gram) -> Coefficients:
    """Add the two gradients, each divided by its length.

    <d, g_r> >= 0 and <d, g_f> >= 0 always: to first order neither loss rises.

    Source: NGDiff, arXiv:2410.22086, with the gradients accumulated over the step. Differs: any
        forget loss, not the negative likelihood only; a gradient of zero contributes nothing.
    """
    return Coefficients(inverse(math.sqrt(products.forget)), inverse(math.sqrt(products.retain)))


def blur(products: Gram, *, alpha: float = 1.0, gamma: float = 1.0) -> Coefficients:
    """Make the retain gradient orthogonal to the forget gradient, always, and add the two.

    d = gamma g_f + alpha (g_r - <g_r, g_f> / |g_f|^2 g_f).

    Source: BLUR, EACL 2026, both released forms: alpha=1 with gamma chosen (MUSE), gamma=1 with
        alpha chosen (WMDP). Differs: no difference.
    """
    return Coefficients(gamma - alpha * products.cross * inverse(products.forget), alpha)


class Projection(Combination):
    """A combination that is a blend of the two gradients by their products.

    Subclasses override `coefficients`. Products are over all trainable parameters of all ranks.
    """

    gradients = True

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def coefficients(self, products: Gram) -> Coefficients:
        """Say how much of each gradient the direction holds."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} is a Projection, so it must define coefficients().")

    def __call__(self, forget: Gradient, retain: Gradient, reduce: Reduce = whole) -> Gradient:
        """Give the direction, written over `retain`."""
        products = gram(forget, retain, reduce)
        if math.isnan(products.cross):
            return blend(forget, retain, self._observe(products, Coefficients(math.nan, math.nan)))
        return blend(forget, retain, self._observe(products, self.coefficients(products)))

    def combine(self, window: Window) -> Gradient:
        """Blend the gradients of a window."""
        forget = window.gradient("forget")
        return self(forget, window.gradient("retain"), window.reduce)

    def observations(self) -> dict[str, float]:
        """Norms by role, the cosine between them and the coefficients."""
        return dict(self._seen)

    def _observe(self, products: Gram, by: Coefficients) -> Coefficients:
        self._seen = {
            "forget/grad_norm": math.sqrt(products.forget),
            "retain/grad_norm": math.sqrt(products.retain),
            "combine/cosine": products.cosine,
            "combine/forget_coefficient": by.forget,
            "combine/retain_coefficient": by.retain,
        }
        return by


class Surgery(Projection):
    """`surgery` with its tolerance."""

    def __init__(self, *, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = check_number("eps", eps, least=0.0)

    def coefficients(self, products: Gram) -> Coefficients:
        """See `surgery`."""
        return surgery(products, eps=self.eps)


class PCGrad(Projection):
    """`pcgrad`; it has no parameters."""

    def coefficients(self, products: Gram) -> Coefficients:
        """See `pcgrad`."""
        return pcgrad(products)


class MGDA(Projection):
    """`mgda`, plain or of normalised gradients."""

    def __init__(self, *, normalize: Normalize = "none") -> None:
        super().__init__()
        if normalize not in get_args(Normalize):
            raise UserError(f"normalize: expected none or l2, got {normalize!r}.")
        self.normalize = normalize

    def coefficients(self, products: Gram) -> Coefficients:
        """See `mgda`."""
        return mgda(products, normalize=self.normalize)


class BLUR(Projection):
    """`blur` with its two coefficients."""

    def __init__(self, *, alpha: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, least=0.0)
        self.gamma = check_number("gamma", gamma)

    def coefficients(self, products: Gram) -> Coefficients:
        """See `blur`."""
        return blur(products, alpha=self.alpha, gamma=self.gamma)


class GRU(Combination):
    """Projects the forget gradient off a memory of retain gradients where they conflict.

    m <- average * g_r + (1 - average) * m, from m = g_r in the first step;
    d = g_f - min(0, <g_f, m>) / |m|^2 m + retain_coefficient * g_r.

    `clip_cosine` (the released runs: -0.5) bounds the cosine that the projection goes by, so that
    it takes away at most that share of |g_f|. The memory costs one more gradient, and as much in
    a checkpoint.

    Source: GRU, its released trainer. Differs: in place and on the device, in float32 with
        float64 sums, not flattened on the CPU; the accumulated gradients of a step are projected
        once. How the released clip works is not described: bounding the cosine is ours.
    """

    gradients = True
    sharded = False

    def __init__(
        self,
        *,
        average: float = 0.8,
        clip_cosine: float | None = None,
        retain_coefficient: float = 0.0,
    ) -> None:
        self.average = check_number("average", average, least=0.0, most=1.0)
        self.clip_cosine = -1.0
        if clip_cosine is not None:
            self.clip_cosine = check_number("clip_cosine", clip_cosine, least=-1.0, most=0.0)
        self.retain_coefficient = check_number("retain_coefficient", retain_coefficient)
        self._memory: Gradient | None = None
        self._seen: dict[str, float] = {}

    def __call__(self, forget: Gradient, retain: Gradient, reduce: Reduce = whole) -> Gradient:
        """Remember the retain gradient and give the direction, written over `retain`."""
        if self._memory is None:
            self._memory = [tensor.clone() for tensor in retain]
        else:
            devices = [tensor.device for tensor in retain]  # a loaded memory is on the CPU
            self._memory = [m.to(device) for m, device in zip(self._memory, devices, strict=True)]
            for kept, new in zip(self._memory, retain, strict=True):
                kept.mul_(1 - self.average).add_(new, alpha=self.average)
        norms = dots([(forget, forget), (retain, retain)], reduce)
        products = gram(forget, self._memory, reduce)
        cosine = products.cosine
        self._seen = {
            "forget/grad_norm": math.sqrt(norms[0]),
            "retain/grad_norm": math.sqrt(norms[1]),
            "combine/cosine": cosine,
        }
        direction = blend(forget, retain, Coefficients(1.0, self.retain_coefficient))
        if cosine >= 0:
            return direction
        taken = products.cross * inverse(products.retain)  # not a number stays so
        if cosine < self.clip_cosine:
            taken *= self.clip_cosine / cosine
        for tensor, kept in zip(direction, self._memory, strict=True):
            tensor.add_(kept, alpha=-taken)
        return direction

    def combine(self, window: Window) -> Gradient:
        """Project the forget gradient of a window."""
        forget = window.gradient("forget")
        return self(forget, window.gradient("retain"), window.reduce)

    def observations(self) -> dict[str, float]:
        """Norms by role and the cosine with the memory."""
        return dict(self._seen)

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return {"memory": None if self._memory is None else list(self._memory)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a memory."""
        self._memory = state["memory"]


COMBINATIONS.add("surgery", Surgery)
COMBINATIONS.add("pcgrad", PCGrad)
COMBINATIONS.add("mgda", MGDA)
COMBINATIONS.add("blur", BLUR)
COMBINATIONS.add("gru", GRU)
