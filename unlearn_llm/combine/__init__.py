"""How the two losses of one step become one update: the combinations by name.

Example:
    surgery = COMBINATIONS["surgery"](eps=0.0)
    direction = surgery(forget_gradients, retain_gradients)  # lists of tensors

Nothing here knows of language models; any torch loop may use it.
"""

from unlearn_llm.combine import gradients, ngdiff, ofmu, weights  # noqa: F401  register the names
from unlearn_llm.combine.base import COMBINATIONS, Combination, Step, Window

__all__ = ["COMBINATIONS", "Combination", "Step", "Window"]
