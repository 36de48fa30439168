"""Pydantic's complaints in our words: one line with file, key, value and what was expected."""

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from unlearn_llm.errors import RecipeError
from unlearn_llm.registry import did_you_mean

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], content: Mapping[str, Any], where: str) -> M:
    """Make the model of a mapping; the first thing wrong in it becomes one line.

    Raises:
        RecipeError: naming file, key, value and what was expected.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, place[:-1])
        raise RecipeError(
            f"{where}: unknown key {key!r}.{did_you_mean(place[-1], known)} "
            f"Known here: {', '.join(known)}."
        )
    if first["type"] == "missing":
        raise RecipeError(f"{where}: {key} is missing.")
    if isinstance(first.get("ctx", {}).get("error"), ValueError):  # one of our own validators
        raise RecipeError(f"{where}: {key + ': ' if key else ''}{first['ctx']['error']}")
    reason = first["msg"][0].lower() + first["msg"][1:]
    raise RecipeError(f"{where}: {key}: {reason}, got {first['input']!r}.")


def _keys_at(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """List the keys of the model that stands at a place below `model`."""
    annotation: Any = model
    for part in place:
        if _is_model(annotation):
            annotation = annotation.model_fields[part].annotation
        else:  # dict[str, X] or list[X]
            annotation = get_args(annotation)[-1]
        if get_origin(annotation) in (Union, UnionType):
            annotation = next((a for a in get_args(annotation) if a is not type(None)), annotation)
    return list(annotation.model_fields) if _is_model(annotation) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
