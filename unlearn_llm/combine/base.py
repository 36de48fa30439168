"""What a combination is, and what it sees of a step. The methods register themselves by name."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from unlearn_llm.combine.vectors import Coefficients, Gradient
from unlearn_llm.errors import UserError
from unlearn_llm.registry import Registry
from unlearn_llm.types import Role

EQUAL = Coefficients(1.0, 1.0)


class Window(Protocol):
    """The rows of one optimiser step, at whatever weights the model has when it is asked."""

    @property
    def parameters(self) -> list[Tensor]:
        """What trains. `combine` and `after_step` may write to it."""
        ...

    def reduce(self, partial_sums: Tensor, /) -> Tensor:
        """Add up partial sums over ranks that hold shards."""
        ...

    def gradient(self, role: Role) -> Gradient:
        """Gradient of a role's weighted loss over the whole window: one backward pass."""
        ...

    def loss(self, role: Role) -> float:
        """A role's unweighted loss over the whole window, without gradient or dropout."""
        ...


class Step(NamedTuple):
    """What a step has done, told after the optimiser moved the weights.

    Attributes:
        losses: Unweighted loss of each role before the step.
        learning_rate: The scheduled rate that the step was made with.
        window: Its rows, for losses at the new weights.
    """

    losses: Mapping[Role, float]
    learning_rate: float
    window: Window


class Combination:
    """How two losses of one step become one update: here, they add up.

    A subclass overrides one of two methods:

    - `weights`: coefficients of the losses; the step has one backward pass (`gradients` False).
    - `combine`: the direction, from a window's gradients (`gradients` True).

    Keyword arguments of the class are the `combine_parameters` of a recipe.
    """

    gradients = False
    """Does the combination ask for gradients itself?"""
    sets_retain_weight = False
    """Does it make `retain_weight` meaningless?"""
    repeatable = False
    """Must passes over the same rows give the same gradient (no dropout)?"""
    sharded = True
    """May parameters be spread over ranks (FSDP2)?"""

    def weights(self) -> Coefficients:
        """Coefficients of the two losses of the coming step."""
        return EQUAL

    def combine(self, window: Window) -> Gradient:
        """Make the gradient that is clipped and given to the optimiser."""
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} asks for gradients (gradients = True), so it must define combine(window)."
        )

    def wants_loss_before(self, step: int) -> bool:
        """Must losses before and after the step of this number be comparable (no dropout)?"""
        return False

    def learning_rate_scale(self) -> float:
        """What the scheduled learning rate is multiplied by."""
        return 1.0

    def before_step(self, step: int, window: Window) -> None:
        """Do what must be done just before the optimiser moves the weights."""

    def after_step(self, step: Step) -> None:
        """Learn from a step."""

    def observations(self) -> dict[str, float]:
        """Name numbers of the last step for the logs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


COMBINATIONS: Registry[type[Combination]] = Registry("combination")
COMBINATIONS.add("sum", Combination)


def build(name: str, parameters: Mapping[str, Any]) -> Combination:
    """Make the combination of a name.

    Raises:
        UserError: an unknown name, or parameters that it does not have.
    """
    cls = COMBINATIONS[name]
    try:
        return cls(**parameters)
    except TypeError as error:
        raise UserError(f"combine_parameters of {name!r}: {error}.") from error


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Give a number that a user typed.

    Raises:
        UserError: it is no number, or not in the range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise UserError(f"{name}: expected a number from {least:g} to {most:g}, got {value!r}.")
    return float(value)
