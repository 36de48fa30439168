"""DualOptim and DualOptim+: AdamW whose moments know which role a gradient came from.

These classes allocate, loop and load; the arithmetic is in `update`. Who decides the role of a
step is not here either: see `set_role`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import Any, ClassVar, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from unlearn_llm.optim import chunked
from unlearn_llm.optim.noise import noise_key
from unlearn_llm.optim.storage import (
    allocate,
    can_quantize,
    first_entry,
    is_moment_state,
    local,
    moment_names,
    stored,
)
from unlearn_llm.optim.task import Rule, Task
from unlearn_llm.optim.update import Coefficients, Observed, coefficients
from unlearn_llm.types import ROLES, Role

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Rounding = Literal["nearest", "stochastic"]
Kernel = Callable[[Sequence[Task], Coefficients, Rule], Observed | None]

WORTH_COMPILING = 2**25
"""Entries from which torch.compile's seconds come back within a usual run on a CPU."""


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


class Observations(NamedTuple):
    """What the DualOptim+ steps of one role met, over some steps."""

    negative_square: float
    """Fraction of entries whose second moment came out negative."""
    largest_update: float
    """Largest |step| / lr, before any bound."""


class _Seen(NamedTuple):
    """What was met on one device."""

    negative: Tensor
    largest: Tensor
    entries: int


class DualAdamW(Optimizer):
    """DualOptim: AdamW with one pair of moments per role.

    Every step trains one role, which `set_role` sets beforehand; before anybody does, it is
    "retain". Arithmetic is float32 (float64 for float64 parameters), and so are the moments,
    unless they are kept in 8 bits. A step of a usual size is lost in the rounding of a bfloat16
    parameter: keep float32 parameters.

    Args:
        params: Parameters, groups or named parameters, as torch's optimisers take them. A group
            may have a `state_bits` of its own.
        lr: Learning rate of a retain step.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, with the learning rate of the step's role.
        forget_lr_scale: A forget step's learning rate is `lr` times this.
        state_bits: 32, or 8: one byte per moment and entry, and 4 per 256 entries.
        min_8bit_size: Parameters with fewer entries keep float32 moments.
        rounding: How new moments become bytes. "nearest" as published; "stochastic" does not lose
            the small changes of slow averages, and is the same in every run.
        refuse_nonfinite: With 8 bits, look for infinities in the gradients before a step, which
            would spoil whole blocks. Switch it off where somebody else looks.
        compile: On a CPU, run through torch.compile; None: where the parameters are many enough.

    Raises:
        ValueError: An argument out of its range.

    Source: `update.dual_update`; 8 bits as in bitsandbytes, arXiv:2110.02861.
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
        state_bits: int = 32,
        min_8bit_size: int = 4096,
        rounding: Rounding = "nearest",
        refuse_nonfinite: bool = True,
        compile: bool | None = None,
    ) -> None:
        _check_not_negative(
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            forget_lr_scale=forget_lr_scale,
            min_8bit_size=min_8bit_size,
        )
        check_betas("betas", betas)
        check_choice("state_bits", state_bits, (32, 8))
        check_choice("rounding", rounding, get_args(Rounding))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "forget_lr_scale": forget_lr_scale,
            "state_bits": state_bits,
            "min_8bit_size": min_8bit_size,
            "rounding": rounding,
            "refuse_nonfinite": refuse_nonfinite,
            "compile": compile,
            "role": "retain",
        }
        super().__init__(params, defaults)
        self._observed: dict[Role, dict[torch.device, _Seen]] = {}

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
            RuntimeError: A gradient is sparse, or not finite where moments are kept in 8 bits.
                Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_role(group["role"])
            self._check_gradients(group)
        known = set(self._observed)
        for first, group in zip(self._first_ordinals(), self.param_groups, strict=True):
            self._step_group(group, first, observe=group["role"] not in known)
        return loss

    def drain_observations(self) -> dict[Role, Observations]:
        """Give what the steps of each role met since the last call; nothing for DualOptim.

        All steps; under torch.compile, where looking costs half a step, the first of each role.
        Of this rank's shards, where parameters are sharded.
        """
        drained = {}
        for role, seen in self._observed.items():
            negative = sum(int(one.negative) for one in seen.values())
            entries = sum(one.entries for one in seen.values())
            drained[role] = Observations(
                negative / entries, max(float(one.largest) for one in seen.values())
            )
        self._observed.clear()
        return drained

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; the moments keep their dtype and their width.

        Raises:
            ValueError: The state was written by another optimiser.
        """
        counters = self._counters()
        for saved in state_dict["state"].values():
            if not is_moment_state(saved, self._owners, counters):
                expected = sorted((*counters, *moment_names(*self._owners)))
                raise ValueError(
                    f"This state was not written by {type(self).__name__}: got {sorted(saved)}, "
                    f"expected {expected}. Load it with the optimizer that wrote it."
                )
        # Trap 4: torch would cast every tensor of the state to the parameter's dtype, float32
        # moments to bfloat16 and codes to floats. So it loads the groups, and we the state.
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for saved_id, param in zip(saved_ids, self._all_params(), strict=True):
            if saved_id in state_dict["state"]:
                self.state[param] = {
                    name: value.to(device=param.device) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][saved_id].items()
                }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._observed = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _step_group(self, group: dict[str, Any], first_ordinal: int, *, observe: bool) -> None:
        """Step the parameters of a group, those with equal counters in one call.

        Args:
            observe: Observe even where that costs half a step.
        """
        role: Role = group["role"]
        alike: dict[tuple[int, int, torch.device, bool], list[Task]] = defaultdict(list)
        copies = []
        for ordinal, param in enumerate(group["params"], start=first_ordinal):
            if param.grad is None:
                continue
            state = self._state_of(param, group)
            state[f"{role}_steps"] += 1
            role_step, total_step = state[f"{role}_steps"], self._total_steps(state)
            values = local(param)
            if not values.numel():  # of a shard; its rank, too, has the state that all ranks save
                continue
            task = Task(
                values.contiguous().view(-1),
                local(param.grad).contiguous().view(-1),
                stored(state, role),
                stored(state, "base") if "base" in self._owners else None,
                noise_key(ordinal, total_step, first_entry(param)),
            )
            if not values.is_contiguous():
                copies.append((values, task.param))
            double = values.dtype is torch.float64
            alike[role_step, total_step, values.device, double].append(task)
        for (role_step, total_step, device, double), tasks in alike.items():
            c = self._coefficients(group, role_step, total_step)
            kernel, watch = self._kernel(device, group["compile"], double)
            rule = _rule(group)._replace(observe=watch or observe)
            observed = kernel(tasks, c, rule)
            if observed is not None:
                self._note(role, observed, sum(len(task.param) for task in tasks))
        for values, moved in copies:
            values.copy_(moved.view(values.shape))

    def _note(self, role: Role, observed: Observed, entries: int) -> None:
        """Add to what was met; it stays on its device, for looking would wait for the step."""
        negative, largest = observed.negative.long(), observed.largest
        by_device = self._observed.setdefault(role, {})
        before = by_device.get(largest.device)
        if before is not None:
            negative, largest = before.negative + negative, torch.maximum(before.largest, largest)
            entries += before.entries
        by_device[negative.device] = _Seen(negative, largest, entries)

    def _kernel(
        self, device: torch.device, compile: bool | None, double: bool
    ) -> tuple[Kernel, bool]:
        """Choose what runs the step on a device; tell whether it may observe every step."""
        if device.type == "cuda" and not double and find_spec("triton"):
            from unlearn_llm.optim import triton_step  # Triton is not installed everywhere

            return triton_step.step, True
        if compile is None:
            entries = sum(param.numel() for param in self._all_params())
            compile = device.type == "cpu" and entries >= WORTH_COMPILING
        # Compiled, observing costs half a step.
        return partial(chunked.step, compiled=compile), not compile

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            # Trap 5: both roles at once, for torch.distributed.checkpoint fills a fresh optimiser
            # by one fake step and silently drops what that step did not allocate.
            # Trap 4: counters are ints, because a tensor would be cast with the moments.
            state.update(dict.fromkeys(self._counters(), 0))
            fits = group["state_bits"] == 8 and can_quantize(param, group["min_8bit_size"])
            for owner in self._owners:
                state.update(allocate(param, owner, fits and self._quantizes(owner, group)))
        return state

    def _quantizes(self, owner: str, group: dict[str, Any]) -> bool:
        return True

    def _coefficients(self, group: dict[str, Any], role_step: int, total_step: int) -> Coefficients:
        return coefficients(
            lr=role_lr(group),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            betas=group["betas"],
            role_step=role_step,
        )

    def _check_gradients(self, group: dict[str, Any]) -> None:
        """Refuse what would spoil the state, before anything moves."""
        grads = [
            (i, param.grad) for i, param in enumerate(group["params"]) if param.grad is not None
        ]
        for index, grad in grads:
            if grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} takes dense gradients; got a sparse one for "
                    f"{_name(group, index)}. Use sparse=False in its embedding."
                )
        if group["state_bits"] == 32 or not group["refuse_nonfinite"]:
            return
        grads = [
            (index, local(grad))
            for index, grad in grads
            if local(grad).numel() and grad.dtype is not torch.float64  # has float64 moments
        ]
        if not grads:
            return
        # Of the squares, too, for those are stored.
        norms = torch._foreach_norm([grad for _, grad in grads], dtype=torch.float32)
        finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite()
        for (index, _), fine in zip(grads, finite.tolist(), strict=True):
            if not fine:
                raise RuntimeError(
                    f"The gradient of {_name(group, index)} is not finite, and 8-bit moments "
                    "cannot hold it. Skip this step, or lower the learning rate."
                )

    def _all_params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _first_ordinals(self) -> list[int]:
        sizes = [len(group["params"]) for group in self.param_groups]
        return [0, *accumulate(sizes)][:-1]

    def _counters(self) -> list[str]:
        return [f"{role}_steps" for role in ROLES]

    def _total_steps(self, state: dict[str, Any]) -> int:
        return sum(state[name] for name in self._counters())


def _rule(group: dict[str, Any]) -> Rule:
    """Read a group's rule; DualOptim has no base and no bound."""
    stochastic = group["rounding"] == "stochastic"
    return Rule(group.get("base_order", "lagged"), group.get("max_update"), stochastic)


def role_lr(group: dict[str, Any]) -> float:
    """Give the learning rate of the group's role."""
    scale = group["forget_lr_scale"] if group["role"] == "forget" else 1.0
    return float(group["lr"] * scale)


def _name(group: dict[str, Any], index: int) -> str:
    """Name a parameter as well as the group knows it."""
    shape = tuple(group["params"][index].shape)
    names = group.get("param_names")
    return f"{names[index]!r} {shape}" if names else f"parameter {index} of shape {shape}"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")


def _check_role(role: object) -> None:
    if role not in ROLES:
        raise ValueError(
            f"The role of a step must be 'forget' or 'retain'; got {role!r}. "
            "Call set_role(optimizer, role) before the step."
        )


def check_betas(name: str, betas: tuple[float, float]) -> None:
    """Refuse what is no pair of decays."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{name}: expected two numbers from 0 to below 1, got {betas!r}.")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}.")
