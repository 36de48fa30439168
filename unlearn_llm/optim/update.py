"""The arithmetic of DualOptim and DualOptim+: one step of one parameter, in plain torch.

These functions are the specification. Eager mode, torch.compile and the 8-bit states all call
them; the Triton kernel is compared with them.
"""

from typing import Literal, NamedTuple

from torch import Tensor

BaseOrder = Literal["lagged", "base_first"]
Number = float | Tensor


class Moments(NamedTuple):
    """Running averages of a gradient and of its square, one shape."""

    mean: Tensor
    square: Tensor


class Coefficients(NamedTuple):
    """The numbers of one step, shared by all parameters of a group that stepped as often.

    Floats; or 0-d tensors, for a compiled function must not be compiled anew at every step. A
    weight is 1 - beta, a correction 1 / (1 - beta^steps), which undoes the pull of the zero
    start. DualOptim has no base and ignores its four.
    """

    lr: Number
    decay: Number
    """1 - lr * weight_decay."""
    eps: Number
    mean_weight: Number
    square_weight: Number
    mean_correction: Number
    square_correction: Number
    base_mean_weight: Number
    base_square_weight: Number
    base_mean_correction: Number
    base_square_correction: Number


def coefficients(
    *,
    lr: float,
    weight_decay: float,
    eps: float,
    betas: tuple[float, float],
    role_step: int,
    base_betas: tuple[float, float] = (0.0, 0.0),
    total_step: int = 1,
    base_order: BaseOrder = "lagged",
) -> Coefficients:
    """Make the numbers of one step.

    Args:
        lr: Learning rate of the step's role.
        weight_decay: Decoupled, applied before the step with `lr`.
        eps: Added to the root of the second moment.
        betas: Decay of the role's first and second moment.
        role_step: Steps of this role, counting this one.
        base_betas: Decay of the base's first and second moment.
        total_step: Steps of both roles, counting this one.
        base_order: See `dual_plus_update`.
    """
    # A lagged base was updated once less. Before the first step it is zero, whatever it is
    # divided by.
    base_step = total_step if base_order == "base_first" else max(total_step - 1, 1)
    return Coefficients(
        lr,
        1 - lr * weight_decay,
        eps,
        *(1 - beta for beta in betas),
        *(1 / (1 - beta**role_step) for beta in betas),
        *(1 - beta for beta in base_betas),
        *(1 / (1 - beta**base_step) for beta in base_betas),
    )


class Observed(NamedTuple):
    """What a DualOptim+ step met, 0-d tensors."""

    negative: Tensor
    """Number of entries whose second moment came out negative."""
    largest: Tensor
    """Largest |step| / lr, before any bound."""


def dual_update(param: Tensor, grad: Tensor, moments: Moments, c: Coefficients) -> None:
    """Apply one DualOptim step to one parameter, in place and without autograd.

    This is AdamW on the moments of one role; the other role's moments are not seen.

    Args:
        param: (*) of the moments' dtype.
        grad: (*) of this role's loss, after clipping, of the moments' dtype.
        moments: First and second moment of this role, (*) each.

    Source: DualOptim, arXiv 2504.15827; CityU-MLO/DualOptim@a95ef74 custom_optimizer.py.
        Differs: the decay comes before the step, as in torch's AdamW and in DualOptim+, where
        bitsandbytes' kernels decay after it (a difference of order lr²); the role is given, not
        counted (trap 1).
    """
    _track(moments.mean, grad, c.mean_weight)
    _track(moments.square, grad * grad, c.square_weight)
    root = (moments.square * c.square_correction).sqrt_().add_(c.eps)
    param.mul_(c.decay).sub_((moments.mean * c.mean_correction).mul_(c.lr).div_(root))


def dual_plus_update(
    param: Tensor,
    grad: Tensor,
    base: Moments,
    delta: Moments,
    c: Coefficients,
    *,
    base_order: BaseOrder = "lagged",
    max_update: float | None = None,
    observe: bool = True,
) -> Observed | None:
    """Apply one DualOptim+ step to one parameter, in place and without autograd.

    The direction is Adam's, with moments split into a base shared by both roles and a delta of
    this role; the delta tracks the gradient minus the base. "lagged" updates the base last, so
    that a step sees the base of the step before; "base_first" updates it first.

    Args:
        param: (*) of the moments' dtype.
        grad: (*) of this role's loss, after clipping, of the moments' dtype.
        base: First and second moment shared by the roles, (*) each.
        delta: First and second moment of this role, (*) each. The second may be negative.
        base_order: "lagged" as released, "base_first" as in the talk's equations (4) to (6).
        max_update: Bound on |step| / lr of every entry; None: none, as released.
        observe: Look at the second moments and the updates.

    Returns:
        What was seen, if asked for.

    Source: DualOptim+; CityU-MLO/DualOptimPlus@b370724 trainer/custom_optimizer_plus.py
        adam_decouple_plus_step ("v5"). Differs: no difference in the update where `max_update`
        is None; the role is given, not counted (trap 1). "base_first" adds the bias correction
        that the talk leaves out.
    """
    grad_square = grad * grad
    if base_order == "base_first":
        _track_base(base, grad, grad_square, c)
    shared_mean = base.mean * c.base_mean_correction
    shared_square = base.square * c.base_square_correction
    _track(delta.mean, grad - shared_mean, c.mean_weight)
    _track(delta.square, grad_square - shared_square, c.square_weight)
    mean = (delta.mean * c.mean_correction).add_(shared_mean)
    # The delta of the squares is signed, and so is its sum with the base; the released step takes
    # the magnitude. Where the sum crosses zero the step is large: hence the bound.
    square = (delta.square * c.square_correction).add_(shared_square)
    observed = None
    negative = (square < 0).sum() if observe else None
    update = mean.div_(square.abs_().sqrt_().add_(c.eps))
    if negative is not None:
        observed = Observed(negative, update.abs().max())
    if max_update is not None:
        update.clamp_(-max_update, max_update)
    param.mul_(c.decay).sub_(update.mul_(c.lr))
    if base_order == "lagged":
        _track_base(base, grad, grad_square, c)
    return observed


def _track_base(base: Moments, grad: Tensor, grad_square: Tensor, c: Coefficients) -> None:
    _track(base.mean, grad, c.base_mean_weight)
    _track(base.square, grad_square, c.base_square_weight)


def _track(average: Tensor, value: Tensor, weight: Number) -> None:
    """Move an average towards a value."""
    if isinstance(weight, Tensor):
        # lerp has a second formula for weights above 1/2. Compiled, it chooses between both at
        # every entry, which costs up to a tenth of the step.
        average.add_((value - average) * weight)
    else:
        average.lerp_(value, weight)
