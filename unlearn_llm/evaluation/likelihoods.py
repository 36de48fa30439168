"""What the metrics of likelihood share: asking for the answer, and reading what came back."""

import math
from collections.abc import Mapping

from unlearn_llm.evaluation.requests import LogProb, LogProbResult, Request, Row, Sample

Column = list[float | None]


def asks_answer(sample: Sample) -> Mapping[str, Request]:
    """Ask how likely the answer is; nothing about a row without one."""
    if not sample.answer.strip():
        return {}
    return {"answer": LogProb(sample.question, sample.answer)}


def scored(row: Row, key: str) -> LogProbResult | None:
    """Find what came back under a key; None for nothing, or for an answer without tokens."""
    result = row.results.get(key)
    return result if isinstance(result, LogProbResult) and result.token_logps else None


def loss_of(row: Row, key: str) -> float | None:
    """Give the loss per token under a key, in nats; None where there is none."""
    result = scored(row, key)
    return None if result is None or math.isnan(result.loss) else result.loss


def finite(value: float) -> float | None:
    """Give a number as it is, and None for what is none."""
    return value if math.isfinite(value) else None
