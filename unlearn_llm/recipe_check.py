"""Do the values of a recipe fit the fields of its dataclasses? pydantic finds out, our words say.

Validation is strict: text is no number, 300.0 is no whole number, true is not 1. So what was
validated can be used as it stands.
"""

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from unlearn_llm.errors import RecipeError, UserError
from unlearn_llm.models import ModelSettings, is_adapter
from unlearn_llm.registry import did_you_mean

EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
}

LEAST = {
    "train.learning_rate": 0,
    "train.forget_learning_rate": 0,
    "train.per_device_train_batch_size": 1,
    "train.per_device_eval_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.num_train_epochs": 0,
    "train.max_steps": -1,
    "train.save_steps": 0,
    "train.logging_steps": 0,
    "train.dataloader_num_workers": 0,
    "data.max_length": 1,
}
"""Smallest values of settings that transformers takes as they are, and fails over later."""

NOT_IN_RECIPES = {
    "hub_token": "a recipe is written beside the results; log in with `hf auth login` instead",
    "push_to_hub": "a run's folder has private files in it; upload the finished model by itself",
    "resume_from_checkpoint": "give --resume instead",
    "parallelism_config": "give it to accelerate launch instead",
}


class Place:
    """Where a value stands, for messages: a file, or the command line if an override set it."""

    def __init__(self, file: str, overridden: Collection[str] = ()) -> None:
        self.file = file
        self.overridden = overridden

    def error(self, key: str, problem: str) -> RecipeError:
        """Make the error for a key."""
        from_override = any(
            key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.")
            for name in self.overridden
        )
        return RecipeError(f"{'command line' if from_override else self.file}: {key}: {problem}")

    @contextmanager
    def naming(self, key: str) -> Iterator[None]:
        """Turn what is refused inside into the error for a key."""
        try:
            yield
        except (UserError, ValueError, TypeError) as error:
            raise self.error(key, str(error)) from error


def check_section(settings: type, content: Any, section: str, place: Place) -> None:
    """Refuse unknown keys and values of another type than the dataclass field has.

    Raises:
        RecipeError: file, key, what was got, what was expected.
    """
    for name, remedy in NOT_IN_RECIPES.items():
        if isinstance(content, Mapping) and name in content:
            raise place.error(f"{section}.{name}", f"cannot be set in a recipe; {remedy}.")
    try:
        # Through JSON, because strict validation of Python objects wants instances, not mappings.
        _schema(settings).__pydantic_validator__.validate_json(json.dumps(content, default=repr))
    except ValidationError as error:
        raise _in_our_words(error, content, settings, section, place) from error
    _check_values(content, section, place)


def _check_values(content: Mapping[str, Any], section: str, place: Place) -> None:
    """Refuse numbers that are too small, runs without a step and patterns that are none."""
    for name, value in content.items():
        least = LEAST.get(f"{section}.{name}")
        if least is not None and isinstance(value, int | float) and value < least:
            raise place.error(f"{section}.{name}", f"expected a number from {least}, got {value}.")
    if section != "train":
        return
    steps, epochs = content.get("max_steps", -1), content.get("num_train_epochs", 1)
    if steps == 0 or (steps < 0 and epochs == 0):
        key = "max_steps" if steps == 0 else "num_train_epochs"
        raise place.error(f"train.{key}", "is 0, so there are no steps to train; expected from 1.")
    try:
        re.compile(content.get("trainable") or "")
    except re.error as error:
        raise place.error("train.trainable", f"is no regular expression: {error}.") from error


def build(settings: type, content: Mapping[str, Any]) -> Any:
    """Make the dataclass, with those inside it, of a section that `check_section` has passed."""
    return TypeAdapter(settings).validate_python(content)


def check_name(name: Any, known: Collection[str], key: str, place: Place) -> None:
    """Refuse a name that is not among the known ones."""
    if name not in known:
        near = did_you_mean(str(name), known)
        raise place.error(key, f"expected {_either(sorted(known))}, got {name!r}.{near}")


def check_model(model: ModelSettings, place: Place) -> None:
    """Refuse a model that is not named, and settings of it that cannot work together."""
    if model.path is None and model.new is None:
        raise place.error("model.path", "is missing: give a local folder or a hub id.")
    if model.new is not None:
        for name in ("lora", "adapter", "four_bit"):
            if getattr(model, name) is not None:
                raise place.error(f"model.{name}", "is not for a new model, which trains whole.")
    if model.adapter is not None and model.lora is not None:
        problem = "is trained further, model.lora is a fresh one; give one of them."
        raise place.error("model.adapter", problem)
    if model.four_bit is not None and not (model.lora or model.adapter or is_adapter(model)):
        problem = "holds weights that cannot train. Give model.lora or model.adapter, too."
        raise place.error("model.four_bit", problem)


def check_during(
    kind: str, train: Mapping[str, Any], evaluate: Mapping[str, Any] | None, place: Place
) -> None:
    """Refuse evaluations during training that nothing can make, and settings that nobody reads."""
    strategy = train.get("eval_strategy", "no")
    key = "eval_strategy" if strategy != "no" else "eval_on_start"
    if strategy == "no" and not train.get("eval_on_start"):
        for name in ("during", "target"):
            if evaluate is not None and evaluate.get(name):
                problem = "is given, but train.eval_strategy is 'no', so no step is evaluated."
                raise place.error(f"evaluate.{name}", problem)
    elif evaluate is None:
        raise place.error(f"train.{key}", "needs an evaluate section, or must be off.")
    elif kind == "finetune":
        raise place.error(f"train.{key}", "is read by kind: unlearn only.")


def check_parameters(given: Mapping[str, Any], of: type) -> None:
    """Refuse keyword arguments that a class does not take."""
    known = [name for name in inspect.signature(of).parameters if name not in ("params", "lr")]
    for name in given:
        if name not in known:
            raise UserError(
                f"{of.__name__} has no parameter {name!r}.{did_you_mean(name, known)} "
                f"It has {', '.join(known) or 'none'}."
            )


@cache
def _schema(settings: type) -> type[BaseModel]:
    """Make the pydantic model with the fields of a dataclass; unknown keys are errors."""
    hints = typing.get_type_hints(settings)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.init and field.name not in NOT_IN_RECIPES:
            fields[field.name] = (_strict(hints[field.name]), ... if _required(field) else None)
    config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )
    return create_model(settings.__name__, __config__=config, **fields)


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _strict(hint: Any) -> Any:
    """Replace dataclasses by their schemas, and `Enum | str` by the enum: names are told."""
    if dataclasses.is_dataclass(hint) and _is_ours(hint):
        return _schema(typing.cast(type, hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
            members = tuple(member for member in members if member is not str)
        return typing.Union[tuple(_strict(member) for member in members)]  # noqa: UP007  built
    if typing.get_origin(hint) is list:
        return list[_strict(typing.get_args(hint)[0])]  # type: ignore[misc]  # made at run time
    return hint


def _is_ours(hint: Any) -> bool:
    return str(getattr(hint, "__module__", "")).startswith("unlearn_llm.")


def _in_our_words(
    error: ValidationError, content: Any, settings: type, section: str, place: Place
) -> RecipeError:
    faults: dict[str, list[Any]] = {}
    for fault in error.errors(include_url=False, include_context=True):
        keys, value = _follow(content, fault["loc"])
        key = ".".join([section, *keys])
        if fault["type"] == "extra_forbidden":
            known = _keys(settings, keys[:-1])
            return place.error(key, f"unknown key.{did_you_mean(keys[-1], known)}")
        if fault["type"] == "missing":
            return place.error(f"{key}.{fault['loc'][-1]}", "is missing.")
        faults.setdefault(key, []).append((fault, value))
    key, found = next(iter(faults.items()))
    value = found[0][1]
    expected, names = [], []
    for fault, _ in found:
        if fault["type"] in ("enum", "literal_error"):
            names += re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        else:
            expected.append(EXPECTED.get(fault["type"], fault["msg"].lower()))
    words = _either([*dict.fromkeys(expected), *names])
    near = did_you_mean(value, names) if isinstance(value, str) else ""
    return place.error(key, f"expected {words}, got {_shown(value)}.{near}")


def _follow(content: Any, location: Sequence[Any]) -> tuple[list[str], Any]:
    """Walk as far as the location names keys of the content; the rest are members of a union."""
    keys: list[str] = []
    for part in location:
        inside = isinstance(content, Mapping) and part in content
        if not inside and not (isinstance(content, list) and isinstance(part, int)):
            continue
        content = content[part]
        keys.append(str(part))
    return keys, content


def _keys(settings: type, keys: Sequence[str]) -> list[str]:
    """Name the fields of the dataclass that stands below some keys."""
    for key in keys:
        hint = typing.get_type_hints(settings)[key]
        members = [member for member in (hint, *typing.get_args(hint)) if _is_ours(member)]
        if not members:
            return []
        settings = members[0]
    return [field.name for field in dataclasses.fields(settings)]


def _either(words: Sequence[str], most: int = 12) -> str:
    if len(words) > most:
        words = [*words[:most], "..."]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
