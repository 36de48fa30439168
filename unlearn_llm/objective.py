"""What is minimised: losses by name, and pairs of them, written "idk+ap"."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from unlearn_llm.errors import UserError
from unlearn_llm.registry import Registry, did_you_mean
from unlearn_llm.types import IGNORE_INDEX, Answer, Role, Scored, Sequences

LossFn = Callable[..., Tensor]
Weigh = Callable[..., Tensor]
Per = Literal["token", "sequence"] | Weigh
Positions = Literal["answer", "answer_after_first", "attended"]
Needs = Literal["logp", "distribution", "hidden"]
Kind = Literal["targeted", "untargeted"]


@dataclass(frozen=True)
class Loss:
    """One side of an objective: a function of scored sequences, and what it needs.

    Called as `loss(policy, reference)` with one Scored per answer; returns (B,) float32, one
    number per sequence. The trainer divides the sum over the window by what `per` names.

    Attributes:
        answers: The answers it reads: "original", "idk" (a refusal), "random" (of another row),
            "alternate" (a column of the data).
        per: "token": the sum over sequences is divided by the number of scored tokens in the
            window; "sequence": by the number of sequences. Mixing the two changes the weight of a
            loss by the length of an answer. Or a function of the scored policy and the parameters
            that gives a weight for each sequence, (B,): by their sum, which takes a pass without
            gradient over the window.
        positions: "answer" scores the answer's tokens, "answer_after_first" all but the first of
            them, "attended" every real token.
        reference: What it reads of the reference model, None if nothing.
        kind: For forget losses, "targeted" if the model is taught to refuse (OVR then contains
            TFE), "untargeted" if not.
        parameters: Keyword arguments bound by the recipe, such as beta.
    """

    name: str
    function: LossFn
    answers: tuple[Answer, ...]
    per: Per
    positions: Positions = "answer"
    reference: Needs | None = None
    kind: Kind | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, policy: Mapping[Answer, Scored], reference: Mapping[Answer, Scored] | None = None
    ) -> Tensor:
        """Compute the loss of every sequence, (B,)."""
        scored = (policy,) if self.reference is None else (policy, reference)
        return self.function(*scored, **self.parameters)

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers whose hidden states it reads: its argument `layers`, if it has one."""
        argument = inspect.signature(self.function).parameters.get("layers")
        layers = () if argument is None else self.parameters.get("layers", argument.default)
        if not isinstance(layers, list | tuple):
            raise UserError(f"{self.name}: layers: expected a list such as [7], got {layers!r}.")
        return tuple(layers)

    def count(
        self,
        sequences: Mapping[Answer, Sequences],
        policy: Callable[[], Mapping[Answer, Scored]] | None = None,
    ) -> int | float:
        """Count what the loss is averaged by: scored tokens of its answers, sequences, or weights.

        Args:
            policy: Scores the sequences; needed and called for weights only.
        """
        if callable(self.per):
            assert policy is not None
            return float(self.per(policy(), **self.parameters).sum())
        if self.per == "sequence":
            return len(sequences[self.answers[0]]["rows"])
        counted = 0
        for answer in self.answers:
            batch = sequences[answer]
            counted += int(scored_positions(batch, self.positions).sum())
        return counted

    def bind(self, parameters: Mapping[str, Any]) -> "Loss":
        """Give keyword arguments of the loss.

        Raises:
            UserError: an argument that the loss does not have.
        """
        known = [
            parameter.name
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        for name in parameters:
            if name not in known:
                raise UserError(
                    f"The loss {self.name!r} has no parameter {name!r}.{did_you_mean(name, known)} "
                    f"It has {', '.join(known) or 'none'}."
                )
        return replace(self, parameters={**self.parameters, **parameters})


def scored_positions(sequences: Sequences, positions: Positions) -> Tensor:
    """Say where the next token counts, (B, T-1) bool."""
    if positions == "attended":
        return sequences["attention_mask"][:, 1:].bool()
    answer = sequences["labels"][:, 1:] != IGNORE_INDEX
    return answer if positions == "answer" else answer & (answer.cumsum(-1) > 1)


FORGET_LOSSES: Registry[Loss] = Registry("forget loss")
RETAIN_LOSSES: Registry[Loss] = Registry("retain loss")


def forget_loss(
    name: str,
    *,
    kind: Kind,
    per: Per,
    answers: tuple[Answer, ...] = ("original",),
    positions: Positions = "answer",
    reference: Needs | None = None,
) -> Callable[[LossFn], Loss]:
    """Register the decorated function as a forget loss; see Loss for the arguments."""

    def register(function: LossFn) -> Loss:
        loss = Loss(name, function, answers, per, positions, reference, kind)
        return FORGET_LOSSES.add(name, loss)

    return register


def retain_loss(
    name: str,
    *,
    per: Per,
    answers: tuple[Answer, ...] = ("original",),
    positions: Positions = "answer",
    reference: Needs | None = None,
) -> Callable[[LossFn], Loss]:
    """Register the decorated function as a retain loss; see Loss for the arguments."""

    def register(function: LossFn) -> Loss:
        loss = Loss(name, function, answers, per, positions, reference)
        return RETAIN_LOSSES.add(name, loss)

    return register


@dataclass(frozen=True)
class Objective:
    """A forget loss and a retain loss, with their coefficients."""

    forget: Loss
    retain: Loss
    forget_weight: float = 1.0
    retain_weight: float = 1.0

    @classmethod
    def parse(
        cls,
        name: str,
        *,
        forget: Mapping[str, Any] | None = None,
        retain: Mapping[str, Any] | None = None,
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
    ) -> "Objective":
        """Read "npo+kl": forget side, plus sign, retain side; exact names.

        Args:
            forget, retain: Parameters of the two losses, such as {"beta": 0.1}.

        Raises:
            UserError: the name has no plus sign, or a side is unknown.
        """
        forget_name, plus, retain_name = name.partition("+")
        if not plus:
            raise UserError(
                f"objective: expected 'forget+retain' such as 'idk+ap', got {name!r}. "
                f"Forget: {', '.join(FORGET_LOSSES)}; retain: {', '.join(RETAIN_LOSSES)}."
            )
        return cls(
            _find(FORGET_LOSSES, forget_name).bind(forget or {}),
            _find(RETAIN_LOSSES, retain_name).bind(retain or {}),
            forget_weight,
            retain_weight,
        )

    @property
    def needs(self) -> dict[Role, Needs]:
        """What the loss of each role reads of the reference; roles without need left out."""
        losses: dict[Role, Loss] = {"forget": self.forget, "retain": self.retain}
        # Cached log-probabilities are those of answers; other positions need the model itself.
        return {
            role: loss.reference if loss.positions == "answer" else "distribution"
            for role, loss in losses.items()
            if loss.reference is not None
        }

    @property
    def name(self) -> str:
        """The name it was parsed from."""
        return f"{self.forget.name}+{self.retain.name}"


def _find(losses: Registry[Loss], name: str) -> Loss:
    loss = losses[name]
    if not isinstance(loss, Loss):  # of the user's own module
        raise UserError(
            f"{name!r} is no {losses.kind}: decorate it with @forget_loss or @retain_loss."
        )
    return loss
