"""When each side is trained: roles as a pure function of the step, and the plan of all draws."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch.utils.data import Sampler

from unlearn_llm.errors import UserError
from unlearn_llm.registry import Registry
from unlearn_llm.types import ROLES, Role


class Schedule(Protocol):
    """Says which roles an optimiser step trains."""

    def roles(self, step: int) -> tuple[Role, ...]:
        """Roles of the step with this number (from 0), in the order of ROLES."""
        ...

    def steps_for(self, forget_steps: int) -> int:
        """Number of steps, in whole cycles, that hold at least this many forget steps."""
        ...


@dataclass(frozen=True)
class Joint:
    """Both roles at every step: one loss, the weighted sum of the two."""

    def roles(self, step: int) -> tuple[Role, ...]:
        """Both, whatever the step."""
        return ROLES

    def steps_for(self, forget_steps: int) -> int:
        """Every step is a forget step."""
        return forget_steps


@dataclass(frozen=True)
class Alternate:
    """`forget` steps, then `retain` steps, and again. 1:5 is what the published runs use.

    Source: DualOptim+ scripts (forget_freq 1, retain_freq 5). Differs: a function of the global
    step; the authors count in the optimiser, per parameter, and drift after a skipped step
    (trap 1). SCRUB (meghdadk/SCRUB scrub.py, msteps) takes both numbers so large that each is a
    pass over its set, and leaves the forget steps out after `forget_cycles` cycles.
    """

    forget: int = 1
    retain: int = 5
    forget_cycles: int | None = None
    """Number of cycles after which every step is a retain step; None: there is no such number."""

    def __post_init__(self) -> None:
        if self.forget < 0 or self.retain < 0 or self.forget + self.retain == 0:
            raise UserError(
                "alternate needs numbers of steps >= 0, not both 0; got "
                f"forget={self.forget}, retain={self.retain}."
            )
        if self.forget_cycles is not None and (self.forget_cycles < 1 or self.retain == 0):
            raise UserError(
                "alternate with forget_cycles needs at least 1 of them, and retain steps to go on "
                f"with; got forget_cycles={self.forget_cycles}, retain={self.retain}."
            )

    def roles(self, step: int) -> tuple[Role, ...]:
        """Forget in the first `forget` steps of each cycle, retain in the rest."""
        cycle, in_cycle = divmod(step, self.forget + self.retain)
        if self.forget_cycles is not None and cycle >= self.forget_cycles:
            return ("retain",)
        return ("forget",) if in_cycle < self.forget else ("retain",)

    def steps_for(self, forget_steps: int) -> int:
        """Whole cycles; a schedule without forget steps has no forget epochs."""
        if self.forget == 0:
            raise UserError(
                "alternate with forget=0 never passes over the forget set, so num_train_epochs "
                "means nothing. Set max_steps."
            )
        cycles = -(-forget_steps // self.forget)
        if self.forget_cycles is not None and cycles > self.forget_cycles:
            raise UserError(
                f"alternate with forget_cycles={self.forget_cycles} has "
                f"{self.forget_cycles * self.forget} forget steps; num_train_epochs asks for "
                f"{forget_steps}. Set max_steps."
            )
        return cycles * (self.forget + self.retain)


SCHEDULES: Registry[type[Schedule]] = Registry("schedule")
SCHEDULES.add("joint", Joint)
SCHEDULES.add("alternate", Alternate)

Pairing = Literal["random", "fixed"]


class Draw(NamedTuple):
    """Which row of each role one position of a micro-batch holds; None: none of that role."""

    forget: int | None = None
    retain: int | None = None


class ScheduledSampler(Sampler[Draw]):
    """The plan of a whole run: every row that every step draws, in order.

    Rows come from (seed, role, pass, position) only: a permutation of the role's rows for each
    pass over them. No global generator is used, so ranks cannot draw the same rows by accident
    and a resumed run draws what it would have drawn. The plan covers all steps, because
    `set_epoch` does not reach a custom sampler after a resume under DDP (trap 3).

    Inside a window rows are sorted by length, so that micro-batches need little padding. A window
    is one optimiser step, so the mathematics stays the same.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        lengths: dict[Role, Sequence[int]],
        steps: int,
        window: int,
        seed: int,
        pairing: Pairing = "random",
        by_length: bool = True,
    ) -> None:
        """Lay out a plan.

        Args:
            lengths: Length in tokens of every row of each role.
            steps: Number of optimiser steps.
            window: Rows of a role per step: batch per device x accumulation x ranks.
            pairing: Which retain row meets which forget row in a joint step: "random" draws
                retain rows in passes of their own; "fixed" gives a forget row the same partner
                in every pass, as the authors' joint baseline does (it sees at most as many
                retain rows as there are forget rows).
            by_length: Sort each window by length. Not where micro-batch means are averaged: they
                would then depend on it.
        """
        self.schedule = schedule
        self.lengths = lengths
        self.steps = steps
        self.window = window
        self.seed = seed
        self.pairing = pairing
        self.by_length = by_length

    def __len__(self) -> int:
        return self.steps * self.window

    def __iter__(self) -> Iterator[Draw]:
        rows: dict[Role, Iterator[int]] = {role: self._passes(role) for role in ROLES}
        for step in range(self.steps):
            roles = self.schedule.roles(step)
            drawn = {role: self._window(role, rows[role]) for role in roles}
            if self.pairing == "fixed" and len(roles) == 2:
                drawn["retain"] = [self._partner(row) for row in drawn["forget"]]
            for position in range(self.window):
                yield Draw(**{role: window[position] for role, window in drawn.items()})

    def _window(self, role: Role, rows: Iterator[int]) -> list[int]:
        window = [next(rows) for _ in range(self.window)]
        if not self.by_length:
            return window
        return sorted(window, key=lambda row: self.lengths[role][row], reverse=True)

    def _passes(self, role: Role) -> Iterator[int]:
        """Rows of a role, pass after pass, each pass in an order of its own."""
        number = 0
        while True:
            order = list(range(len(self.lengths[role])))
            random.Random(f"{self.seed}/{role}/{number}").shuffle(order)
            yield from order
            number += 1

    def _partner(self, forget_row: int) -> int:
        n_retain = len(self.lengths["retain"])
        return random.Random(f"{self.seed}/partner/{forget_row}").randrange(n_retain)
