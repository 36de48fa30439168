"""Attacks on a model that should have forgotten. Importing this registers them."""

from unlearn_llm.attacks import (
    adapter,
    prefix,
    probing,
    quantisation,
    questions,
    relearning,
    sampling,
)

__all__ = ["adapter", "prefix", "probing", "quantisation", "questions", "relearning", "sampling"]
