"""The options of aggregates: which there are, which metrics they name, which proxies exist."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from unlearn_llm.evaluation.aggregates import AGGREGATES
from unlearn_llm.evaluation.metrics import METRICS

PROXY = "_proxy"


def known(aggregate: str) -> list[str]:
    """List the options of an aggregate.

    Raises:
        UserError: no such aggregate.
    """
    parameters = inspect.signature(AGGREGATES[aggregate]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def metrics_of(aggregate: str, options: Mapping[str, Any]) -> set[str]:
    """Name the metrics that an aggregate reads with these options."""
    parts = _parts(aggregate, options)
    nested = (metrics_of(part, given) for _, part, given in parts)
    own = (value for _, value in _metric_options(aggregate, options))
    return set(own).union(*nested)


def with_proxies(
    aggregate: str, options: Mapping[str, Any], kinds: Collection[str]
) -> dict[str, Any]:
    """Give the options with proxies in place of the metrics that need a judge of these kinds."""
    replaced = dict(options)
    for option, metric in _metric_options(aggregate, options):
        if proxy_of(metric, kinds) != metric:
            replaced[option] = proxy_of(metric, kinds)
    for option, part, given in _parts(aggregate, options):
        of_part = with_proxies(part, given, kinds)
        if option != "members" and of_part != given:
            replaced[option] = of_part
    if "members" in options:
        replaced["members"] = [
            {**member, **with_proxies(_aggregate_of(member), _given(member), kinds)}
            for member in options["members"]
        ]
    return replaced


def proxy_of(metric: str, kinds: Collection[str]) -> str:
    """Name the proxy of a metric that needs a judge of these kinds; others are their own."""
    missing = METRICS[metric].judge in kinds
    return f"{metric}{PROXY}" if missing and f"{metric}{PROXY}" in METRICS else metric


def _metric_options(aggregate: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the options whose value, given or by default, is the name of a metric."""
    parameters = inspect.signature(AGGREGATES[aggregate]).parameters
    for name in known(aggregate):
        value = options.get(name, parameters[name].default)
        if isinstance(value, str) and value in METRICS:
            yield name, value


def _parts(
    aggregate: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the aggregates inside a composite one: option, aggregate, its options."""
    if aggregate in ("hmean", "average"):
        for member in options.get("members", ()):
            yield "members", _aggregate_of(member), _given(member)
    if aggregate == "ovr":
        yield "ufe_options", "ufe", options.get("ufe_options") or {}
        if options.get("kind") != "untargeted":
            yield "tfe_options", "tfe", options.get("tfe_options") or {}
        utility = str(options.get("utility", "mu18"))
        yield "mu_options", utility, options.get("mu_options") or {}


def _given(member: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in member.items() if name != "aggregate"}


def _aggregate_of(member: Mapping[str, Any]) -> str:
    return str(member.get("aggregate", "mean"))
