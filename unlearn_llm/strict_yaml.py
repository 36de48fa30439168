"""YAML that means what it says: unknown and double keys are errors, 1e-5 is a number."""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from unlearn_llm.errors import RecipeError
from unlearn_llm.registry import did_you_mean

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: {key!r} stands twice.")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a point and a sign: 1.0e-5 (trap in architecture 3.9).
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        RecipeError: naming the file, and the line where it cannot be read.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except RecipeError as error:
        raise RecipeError(f"{path.name}, {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path.name}{line}: not YAML ({problem}).") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path.name}: expected keys with values, got {type(content).__name__}.")
    return content


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
