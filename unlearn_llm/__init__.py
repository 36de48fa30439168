"""Make a language model forget what it must no longer know, and prove it.

The public names load on first use: `import unlearn_llm` imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn_llm.config import UnlearnConfig
    from unlearn_llm.encode import Encoder, Template
    from unlearn_llm.errors import UserError
    from unlearn_llm.evaluation.suite import Suite
    from unlearn_llm.finetune import FinetuneConfig
    from unlearn_llm.objective import Loss, Objective, forget_loss, retain_loss
    from unlearn_llm.optim import DualAdamW, DualAdamWPlus, set_role
    from unlearn_llm.recipe import Recipe
    from unlearn_llm.rows import load_rows
    from unlearn_llm.schedule import Alternate, Joint
    from unlearn_llm.trainer import UnlearnTrainer
    from unlearn_llm.types import Scored

__version__ = "0.1.0"

__all__ = [
    "Alternate",
    "DualAdamW",
    "DualAdamWPlus",
    "Encoder",
    "FinetuneConfig",
    "Joint",
    "Loss",
    "Objective",
    "Recipe",
    "Scored",
    "Suite",
    "Template",
    "UnlearnConfig",
    "UnlearnTrainer",
    "UserError",
    "__version__",
    "forget_loss",
    "load_rows",
    "retain_loss",
    "set_role",
]

_HOMES = {
    "config": ("UnlearnConfig",),
    "encode": ("Encoder", "Template"),
    "errors": ("UserError",),
    "evaluation.suite": ("Suite",),
    "finetune": ("FinetuneConfig",),
    "objective": ("Loss", "Objective", "forget_loss", "retain_loss"),
    "optim": ("DualAdamW", "DualAdamWPlus", "set_role"),
    "recipe": ("Recipe",),
    "rows": ("load_rows",),
    "schedule": ("Alternate", "Joint"),
    "trainer": ("UnlearnTrainer",),
    "types": ("Scored",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"unlearn_llm.{home}"), name)
    raise AttributeError(f"module 'unlearn_llm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
