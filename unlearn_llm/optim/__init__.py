"""How gradients become an update, with memory per role: the optimisers by name.

An optimiser reads the role of a step from its parameter groups, as it reads the learning rate.
Nothing here knows of language models; any torch loop may use it.

Example:
    optimizer = DualAdamWPlus(model.parameters(), lr=2e-3)
    for role in ["forget", *["retain"] * 5] * 50:
        set_role(optimizer, role)
        optimizer.step(closures[role])

Here `closures[role]()` clears the gradients, runs the backward pass of that role's loss on the
next batch and returns the loss, as for every torch optimiser. `optimizer.step()` after a backward
pass does the same.
"""

from torch.optim import Optimizer

from unlearn_llm.optim.dual import DualAdamW, set_role
from unlearn_llm.optim.dual_plus import DualAdamWPlus
from unlearn_llm.registry import Registry

OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer")
OPTIMIZERS.add("dual_adamw", DualAdamW)
OPTIMIZERS.add("dual_adamw_plus", DualAdamWPlus)

__all__ = ["OPTIMIZERS", "DualAdamW", "DualAdamWPlus", "set_role"]
