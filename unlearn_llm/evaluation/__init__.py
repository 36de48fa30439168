"""Evaluation: ask the model once, then only arithmetic."""
