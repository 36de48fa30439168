"""Two variants of one computation, timed in turn, so that a busy machine slows both."""

import statistics
from collections.abc import Callable, Mapping, Sequence


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every variant once a round, in another order in every other; give their seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in sorted(variants, reverse=number % 2 == 0):
            seconds[name].append(variants[name]())
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Give the median of each variant."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Give median, least and greatest of the ratios within a round."""
    found = [one / other for one, other in zip(over, under, strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}
