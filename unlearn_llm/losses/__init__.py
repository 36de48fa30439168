"""Published losses, one function each. Importing this package registers their names."""

from unlearn_llm.losses import answers, distributions, forget, hidden, retain, weighted

__all__ = ["answers", "distributions", "forget", "hidden", "retain", "weighted"]
