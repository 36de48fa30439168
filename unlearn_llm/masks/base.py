"""What a mask is, and what it is chosen from. The methods register themselves by name."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from unlearn_llm.errors import UserError
from unlearn_llm.registry import Registry
from unlearn_llm.types import ROLES, Role


class Gradients(Protocol):
    """Gradients over whole data sets, at the weights before step one, without dropout.

    Of the original answers' negative log-likelihood S, whatever the objective is. Each call is one
    pass over the rows of a role and gives one float32 tensor for each parameter that trains.
    """

    def mean(self, role: Role) -> list[Tensor]:
        """Gradient of the token mean of S."""
        ...

    def mean_square(self, role: Role) -> list[Tensor]:
        """Mean over rows of the squared gradient of S: the diagonal of the empirical Fisher."""
        ...


class Mask:
    """Chooses, once, the entries of the weights that may move.

    A subclass overrides `choose`. Keyword arguments of the class are the `mask_parameters` of a
    recipe.
    """

    roles: tuple[Role, ...] = ROLES
    """In steps of these roles the other entries are held."""

    def choose(self, gradients: Gradients) -> list[Tensor]:
        """Give a bool tensor for each parameter, True where an entry may move."""
        raise NotImplementedError(f"{type(self).__name__} is a Mask, so it must define choose().")


MASKS: Registry[type[Mask]] = Registry("mask")


def build(name: str, parameters: Mapping[str, Any]) -> Mask:
    """Make the mask of a name.

    Raises:
        UserError: an unknown name, or parameters that it does not have.
    """
    cls = MASKS[name]
    try:
        return cls(**parameters)
    except TypeError as error:
        raise UserError(f"mask_parameters of {name!r}: {error}.") from error
