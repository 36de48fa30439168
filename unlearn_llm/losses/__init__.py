"""Published losses, one function each. Importing this package registers their names."""

from unlearn_llm.losses import distributions, forget, retain, weighted

__all__ = ["distributions", "forget", "retain", "weighted"]
