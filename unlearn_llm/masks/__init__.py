"""Which entries of the weights may move: masks by name. Importing this package registers them."""

from unlearn_llm.masks import salun, sfron
from unlearn_llm.masks.base import MASKS, Mask

__all__ = ["MASKS", "Mask", "salun", "sfron"]
