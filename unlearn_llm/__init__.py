"""Make a language model forget what it must no longer know, and prove it.

The public names load on first use: `import unlearn_llm` imports neither torch nor transformers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Alternate": "schedule",
    "DualAdamW": "optim",
    "DualAdamWPlus": "optim",
    "Encoder": "encode",
    "FinetuneConfig": "finetune",
    "Joint": "schedule",
    "Loss": "objective",
    "Objective": "objective",
    "Recipe": "recipe",
    "Scored": "types",
    "Suite": "evaluation.suite",
    "Template": "encode",
    "UnlearnConfig": "config",
    "UnlearnTrainer": "trainer",
    "UserError": "errors",
    "forget_loss": "objective",
    "load_rows": "rows",
    "retain_loss": "objective",
    "set_role": "optim",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unlearn_llm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unlearn_llm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
