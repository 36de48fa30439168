"""What an attack gets and what it gives. How it goes about it is one file per attack."""

import copy
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, get_type_hints

from peft import PeftModel
from pydantic import TypeAdapter, ValidationError

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.four_bit import merged
from unlearn_llm.registry import Registry, did_you_mean


@dataclass(frozen=True)
class Fact:
    """One row that was to be forgotten, or kept; its representation shows no text."""

    id: str
    """Stable name of the row: its number in the source file."""
    question: str = field(repr=False)
    answer: str = field(repr=False)
    paraphrased_question: str | None = field(default=None, repr=False)
    paraphrased_answer: str | None = field(default=None, repr=False)
    """The true answer in the words of the wrong ones."""
    translated_question: str | None = field(default=None, repr=False)
    translated_answer: str | None = field(default=None, repr=False)
    """None: the answer itself may be expected (names, dates)."""
    wrong: tuple[str, ...] = field(default=(), repr=False)
    """Wrong answers of the same form, for the probe."""
    group: str | None = field(default=None, repr=False)
    """Rows of one group (an author) are no independent observations."""


@dataclass(frozen=True)
class Material:
    """What attackers have: the rows they look for, and others."""

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...] = ()
    probe: tuple[Fact, ...] = ()
    """Retained rows with wrong answers, for the probe; empty: those of `retain` that have some."""


@dataclass(frozen=True)
class Trial:
    """What one attack, with one setting, brought back of every row.

    Attributes:
        values: By row id, in [0, 1]: 1 is all of the answer.
        is_text: Are the values recalls of answers in texts, so that 1 is a verbatim leak?
        details: More numbers; no texts.
    """

    name: str
    values: Mapping[str, float]
    is_text: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)


class NotMeasured(Exception):
    """An attack lacks what it needs; the message says what."""


class NotApplicable(Exception):
    """An attack has no object in this model (no adapter to switch off)."""


class Subject:
    """A model under attack.

    Attributes:
        encoder: The template in which the model is asked.
        max_new_tokens: Where an answer is cut.
        progress: Show progress bars; None: as Runner does.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        encoder: Encoder,
        *,
        max_new_tokens: int = 200,
        progress: bool | None = None,
    ) -> None:
        self._load = load
        self.encoder = encoder
        self.max_new_tokens = max_new_tokens
        self.progress = progress

    @classmethod
    def of(cls, model: Any, encoder: Encoder, **settings: Any) -> "Subject":
        """Take a model in memory, which stays as it is."""
        return cls(lambda: copy.deepcopy(model), encoder, **settings)

    @cached_property
    def model(self) -> Any:
        """The model as it is published. Attacks must not change it."""
        return self._load().eval()

    def release(self) -> None:
        """Set the memory of `model` free; it is loaded again when it is asked for."""
        self.__dict__.pop("model", None)

    def fresh(self) -> Any:
        """Load the model again, an adapter merged into its weights, all of them trainable."""
        model = self._load()
        if isinstance(model, PeftModel):
            model = merged(model)
        return model.requires_grad_(True)


class AttackFunction(Protocol):
    """What is registered as an attack."""

    def __call__(self, subject: Subject, material: Material, **options: Any) -> list[Trial]:
        """Attack one model.

        Raises:
            NotMeasured: rows or a library are missing.
            NotApplicable: the model has nothing to attack in this way.
        """
        ...


ATTACKS: Registry[AttackFunction] = Registry("attack")


def attack(name: str) -> Callable[[Callable[..., list[Trial]]], Callable[..., list[Trial]]]:
    """Register the decorated function as the attack `name`.

    Its keyword-only arguments are the options that a user may set: `name.option=value`.
    """

    def register(function: Callable[..., list[Trial]]) -> Callable[..., list[Trial]]:
        ATTACKS.add(name, function)
        return function

    return register


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of an attack by their defaults.

    Raises:
        UserError: an unknown attack or option.
    """
    parameters = inspect.signature(ATTACKS[name]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for option in given:
        if option not in options:
            raise UserError(
                f"{name} has no option {option!r}.{did_you_mean(option, options)} "
                f"It has {', '.join(options) or 'none'}."
            )
    hints = get_type_hints(ATTACKS[name])
    for option, value in given.items():
        try:
            TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{name}.{option}: cannot be {value!r}: {reason}.") from error
    return {**options, **given}


def need(facts: Sequence[Fact], least: int, what: str) -> None:
    """Stop an attack that has too few rows.

    Raises:
        NotMeasured: naming how many there are.
    """
    if len(facts) < least:
        raise NotMeasured(f"needs {least} {what}, got {len(facts)}")


def drawn(facts: Sequence[Fact], most: int, seed: int) -> list[Fact]:
    """Draw up to `most` rows; which row goes before which is fixed by the seed and their ids."""
    mixed = sorted(facts, key=lambda fact: random.Random(f"{seed}/{fact.id}").random())
    return mixed[:most]
