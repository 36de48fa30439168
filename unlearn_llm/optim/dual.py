"""DualOptim and DualOptim+: AdamW whose moments know which role a gradient came from.

The two pure update functions are the specification; the classes below them only allocate, loop
and load. Who decides the role of a step is not here: see `set_role`.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from unlearn_llm.types import ROLES, Role

BaseOrder = Literal["lagged", "base_first"]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Moments(NamedTuple):
    """Running averages of a gradient and of its square, one shape."""

    mean: Tensor
    square: Tensor


def set_role(optimizer: Optimizer, role: Role) -> None:
    """Tell the optimiser which role its next steps train.

    The role travels as a key of the parameter groups, beside the learning rate: that passes
    through wrappers which expose `param_groups`, is saved with the state, and is ignored by other
    optimisers. It is set from outside at every step, because a count kept in the optimiser drifts
    at the first skipped step (trap 1).

    Raises:
        ValueError: The role is neither "forget" nor "retain".
    """
    _check_role(role)
    for group in optimizer.param_groups:
        group["role"] = role


def dual_update(
    param: Tensor,
    grad: Tensor,
    *,
    moments: Moments,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    role_step: int,
) -> None:
    """Apply one DualOptim step to one parameter, in place and without autograd.

    This is AdamW on the moments of one role; the other role's moments are not seen.

    Args:
        param: (*) any float dtype. The arithmetic is that of the moments.
        grad: (*) of this role's loss, after clipping.
        moments: First and second moment of this role, (*) each.
        lr: Learning rate of this role.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, applied before the step with `lr`.
        role_step: Steps of this role, counting this one.

    Source: DualOptim, arXiv 2504.15827; CityU-MLO/DualOptim@a95ef74 custom_optimizer.py.
        Differs: the decay comes before the step, as in torch's AdamW and in DualOptim+, where
        bitsandbytes' kernels decay after it (a difference of order lr²); the role is given, not
        counted (trap 1).
    """
    grad = grad.to(moments.mean.dtype)
    _track(moments, grad, grad * grad, betas)
    _descend(param, _corrected(moments, betas, role_step), lr, eps, weight_decay)


def dual_plus_update(
    param: Tensor,
    grad: Tensor,
    *,
    base: Moments,
    delta: Moments,
    lr: float,
    betas: tuple[float, float],
    base_betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    role_step: int,
    total_step: int,
    base_order: BaseOrder = "lagged",
) -> None:
    """Apply one DualOptim+ step to one parameter, in place and without autograd.

    The direction is Adam's, with moments split into a base shared by both roles and a delta of
    this role; the delta tracks the gradient minus the base. "lagged" updates the base last, so
    that a step sees the base of the step before; "base_first" updates it first.

    Args:
        param: (*) any float dtype. The arithmetic is that of the moments.
        grad: (*) of this role's loss, after clipping.
        base: First and second moment shared by the roles, (*) each.
        delta: First and second moment of this role, (*) each. The second may be negative.
        lr: Learning rate of this role.
        betas: Decay of the delta's first and second moment.
        base_betas: Decay of the base's first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, applied before the step with `lr`.
        role_step: Steps of this role, counting this one.
        total_step: Steps of both roles, counting this one.
        base_order: "lagged" as released, "base_first" as in the talk's equations (4) to (6).

    Source: DualOptim+; CityU-MLO/DualOptimPlus@b370724 trainer/custom_optimizer_plus.py
        adam_decouple_plus_step ("v5"). Differs: no difference in the update; the role is given,
        not counted (trap 1). "base_first" adds the bias correction that the talk leaves out.
    """
    grad = grad.to(base.mean.dtype)
    grad_square = grad * grad
    if base_order == "base_first":
        _track(base, grad, grad_square, base_betas)
        base_step = total_step
    else:
        # Nothing was tracked before the first step: a zero base, whatever it is divided by.
        base_step = max(total_step - 1, 1)
    shared = _corrected(base, base_betas, base_step)
    _track(delta, grad - shared.mean, grad_square - shared.square, betas)
    moments = _corrected(delta, betas, role_step)
    moments.mean.add_(shared.mean)
    # The delta of the squares is signed, and so is its sum with the base; the released step takes
    # the magnitude. Where the sum crosses zero the step is large: a known trait, kept.
    moments.square.add_(shared.square).abs_()
    _descend(param, moments, lr, eps, weight_decay)
    if base_order == "lagged":
        _track(base, grad, grad_square, base_betas)


def _track(moments: Moments, mean: Tensor, square: Tensor, betas: tuple[float, float]) -> None:
    moments.mean.lerp_(mean, 1 - betas[0])
    moments.square.lerp_(square, 1 - betas[1])


def _corrected(moments: Moments, betas: tuple[float, float], step: int) -> Moments:
    """Undo the pull of the zero start; the result is new tensors."""
    return Moments(
        moments.mean / (1 - betas[0] ** step),
        moments.square / (1 - betas[1] ** step),
    )


def _descend(param: Tensor, moments: Moments, lr: float, eps: float, weight_decay: float) -> None:
    """Decay and move the parameter. Overwrites the moments, which the caller made for this."""
    value = param.to(moments.mean.dtype)  # param itself, unless it is bfloat16 or float16
    value.mul_(1 - lr * weight_decay)
    value.sub_(moments.mean.mul_(lr).div_(moments.square.sqrt_().add_(eps)))
    if value is not param:
        param.copy_(value)


class DualAdamW(Optimizer):
    """DualOptim: AdamW with one pair of moments per role.

    Every step trains one role, which `set_role` sets beforehand; before anybody does, it is
    "retain". Moments and arithmetic are float32 (float64 for float64 parameters). A step of a
    usual size is lost in the rounding of a bfloat16 parameter: keep float32 parameters.

    Args:
        params: Parameters, groups or named parameters, as torch's optimisers take them.
        lr: Learning rate of a retain step.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, with the learning rate of the step's role.
        forget_lr_scale: A forget step's learning rate is `lr` times this.

    Raises:
        ValueError: An argument out of its range.

    Source: `dual_update`.
    """

    _owners: ClassVar[tuple[str, ...]] = ROLES

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        forget_lr_scale: float = 1.0,
    ) -> None:
        _check_not_negative(
            lr=lr, eps=eps, weight_decay=weight_decay, forget_lr_scale=forget_lr_scale
        )
        _check_betas("betas", betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "forget_lr_scale": forget_lr_scale,
            "role": "retain",
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of the role that the groups name; skip parameters without a gradient.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            ValueError: A group's role is neither "forget" nor "retain".
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_role(group["role"])
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, param.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; the moments keep their dtype.

        Raises:
            ValueError: The state was written by another optimiser.
        """
        expected = {*self._counters(), *self._moment_names()}
        for saved in state_dict["state"].values():
            if saved.keys() != expected:
                raise ValueError(
                    f"This state was not written by {type(self).__name__}: got {sorted(saved)}, "
                    f"expected {sorted(expected)}. Load it with the optimizer that wrote it."
                )
        super().load_state_dict(state_dict)
        # Trap 4: torch casts every tensor of the state to the parameter's dtype, so the float32
        # moments of a bfloat16 parameter come back rounded. Put the saved ones back.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name in self._moment_names() if saved_id in state_dict["state"] else ():
                saved = state_dict["state"][saved_id][name]
                self.state[param][name] = saved.to(device=param.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _step_one(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients; got a sparse one for a parameter of "
                f"shape {tuple(param.shape)}. Use sparse=False in its embedding."
            )
        state = self.state[param]
        if not state:
            # Trap 5: both roles at once, for torch.distributed.checkpoint fills a fresh optimiser
            # by one fake step and silently drops what that step did not allocate.
            # Trap 4: counters are ints, because a tensor would be cast with the moments.
            state.update(dict.fromkeys(self._counters(), 0))
            dtype = torch.promote_types(param.dtype, torch.float32)
            for name in self._moment_names():
                state[name] = torch.zeros_like(param, dtype=dtype)
        state[f"{group['role']}_steps"] += 1
        self._update(param, grad, group, state)

    def _update(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        role = group["role"]
        dual_update(
            param,
            grad,
            moments=_moments(state, role),
            lr=_role_lr(group),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            role_step=state[f"{role}_steps"],
        )

    def _counters(self) -> list[str]:
        return [f"{role}_steps" for role in ROLES]

    def _moment_names(self) -> list[str]:
        return [f"{owner}_{moment}" for owner in self._owners for moment in Moments._fields]


class DualAdamWPlus(DualAdamW):
    """DualOptim+: AdamW with moments split into a shared base and one delta per role.

    Args:
        params: Parameters, groups or named parameters, as torch's optimisers take them.
        lr: Learning rate of a retain step.
        betas: Decay of the deltas' first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, with the learning rate of the step's role.
        forget_lr_scale: A forget step's learning rate is `lr` times this.
        base_betas: Decay of the base's first and second moment.
        base_order: "lagged" (as released) or "base_first"; see `dual_plus_update`.

    Raises:
        ValueError: An argument out of its range.

    Source: `dual_plus_update`.
    """

    _owners: ClassVar[tuple[str, ...]] = (*ROLES, "base")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        forget_lr_scale: float = 1.0,
        base_betas: tuple[float, float] = (0.9, 0.95),
        base_order: BaseOrder = "lagged",
    ) -> None:
        _check_betas("base_betas", base_betas)
        if base_order not in get_args(BaseOrder):
            raise ValueError(f"base_order: expected 'lagged' or 'base_first', got {base_order!r}.")
        super().__init__(params, lr, betas, eps, weight_decay, forget_lr_scale=forget_lr_scale)
        self.defaults.update(base_betas=base_betas, base_order=base_order)
        for group in self.param_groups:
            group.setdefault("base_betas", base_betas)
            group.setdefault("base_order", base_order)

    def _update(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        role = group["role"]
        dual_plus_update(
            param,
            grad,
            base=_moments(state, "base"),
            delta=_moments(state, role),
            lr=_role_lr(group),
            betas=group["betas"],
            base_betas=group["base_betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            role_step=state[f"{role}_steps"],
            total_step=sum(state[name] for name in self._counters()),
            base_order=group["base_order"],
        )


def _moments(state: dict[str, Any], owner: str) -> Moments:
    return Moments(state[f"{owner}_mean"], state[f"{owner}_square"])


def _role_lr(group: dict[str, Any]) -> float:
    scale = group["forget_lr_scale"] if group["role"] == "forget" else 1.0
    return float(group["lr"] * scale)


def _check_role(role: object) -> None:
    if role not in ROLES:
        raise ValueError(
            f"The role of a step must be 'forget' or 'retain'; got {role!r}. "
            "Call set_role(optimizer, role) before the step."
        )


def _check_betas(name: str, betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{name}: expected two numbers from 0 to below 1, got {betas!r}.")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}.")
