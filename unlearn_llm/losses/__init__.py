"""Published losses, one function each. Importing this package registers their names."""

from unlearn_llm.losses import forget, retain, weighted

__all__ = ["forget", "retain", "weighted"]
