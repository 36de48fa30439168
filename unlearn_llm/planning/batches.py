"""The micro-batches of a whole run, as shapes: of the recipe's own data where they are at hand."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unlearn_llm.dataset import ORIGINAL, Collator, RoleDataset, read_refusals
from unlearn_llm.encode import Encoded, Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.models import load_tokenizer, new_tokenizer
from unlearn_llm.objective import Loss
from unlearn_llm.pipeline import forget_and_retain
from unlearn_llm.planning.simulation import Shape
from unlearn_llm.recipe import DataSettings, Recipe
from unlearn_llm.rows import QA, load_rows, to_pairs
from unlearn_llm.schedule import SCHEDULES, Draw, Schedule, ScheduledSampler
from unlearn_llm.types import IGNORE_INDEX, ROLES, Answer, Role

Kind = tuple[Role, ...]
"""The roles that a step trains; none in a recipe to fine-tune."""
Shapes = Mapping[Role, Mapping[Answer, Shape]]
MULTIPLE = Collator.multiple
SCORED = 0.5
"""Share of assumed tokens that is taken to be answer."""
FINETUNE: Kind = ()


@dataclass
class StepKind:
    """The steps of a run that train the same roles.

    Attributes:
        steps: How many there are.
        worst: The shapes of their largest micro-batch. Fine-tuning has one side, "retain".
        tokens: Of all their micro-batches on one rank, padding included.
    """

    steps: int = 0
    worst: Shapes = field(default_factory=dict)
    tokens: float = 0.0

    def add(self, shapes: Shapes, ranks: int) -> None:
        """Count a micro-batch of any rank."""
        tokens = tokens_of(shapes)
        self.tokens += tokens / ranks
        if tokens > tokens_of(self.worst):
            self.worst = shapes


@dataclass(frozen=True)
class Workload:
    """What a run puts through the model.

    Attributes:
        kinds: By roles that a step trains.
        reference_tokens: Put through once before the first step, on one rank.
        note: Where the lengths come from.
        counted: Is the number of steps known?
    """

    kinds: Mapping[Kind, StepKind]
    reference_tokens: float
    note: str
    counted: bool = True


def tokens_of(shapes: Shapes) -> int:
    """Count the tokens of a micro-batch, padding included."""
    return sum(s.rows * s.width for answers in shapes.values() for s in answers.values())


def workload(recipe: Recipe, ranks: int, length: int | None) -> Workload:
    """Lay out the micro-batches of a run.

    Args:
        length: Take this many tokens per row and do not look at data; None: look.

    Raises:
        UserError: the data are there, and cannot be used.
    """
    if length is not None:
        return _assumed(recipe, ranks, length, f"{length} tokens in every row, as given")
    try:
        return _finetune(recipe, ranks) if recipe.kind == "finetune" else _unlearn(recipe, ranks)
    except UserError as error:
        most = recipe.data.max_length
        note = f"{most} tokens in every row (data.max_length), because of: {error}"
        return _assumed(recipe, ranks, most, note)


def _unlearn(recipe: Recipe, ranks: int) -> Workload:
    data, setting = recipe.data, recipe.setting
    forget, retain = forget_and_retain(data)
    losses = losses_of(recipe)
    encoded = RoleDataset.encode(
        {"forget": forget, "retain": retain},
        _encoder(load_tokenizer(recipe.model), data),
        {role: losses[role].answers for role in ROLES},
        refusals=read_refusals(data.refusals),
        seed=setting("refusal_seed"),
    )
    rows = setting("per_device_train_batch_size")
    window = rows * setting("gradient_accumulation_steps") * ranks
    schedule = schedule_of(recipe)
    steps = setting("max_steps")
    if steps <= 0:
        steps = schedule.steps_for(
            max(1, math.ceil(setting("num_train_epochs") * len(forget) / window))
        )
    sampler = ScheduledSampler(
        schedule,
        lengths={role: encoded.rows[role].lengths for role in ROLES},
        steps=steps,
        window=window,
        seed=setting("seed"),
        pairing=setting("pairing"),
        by_length=setting("averaging") == "window",
    )
    kinds: dict[Kind, StepKind] = {}
    lengths = {role: _Lengths(encoded.rows[role].encoded, losses[role]) for role in ROLES}
    for number, draws in enumerate(_chunks(sampler, rows)):
        kind = schedule.roles(number * rows // window)
        found = kinds.setdefault(kind, StepKind())
        found.add({role: lengths[role].shapes(draws, role) for role in kind}, ranks)
    for step in range(steps):
        kinds[schedule.roles(step)].steps += 1
    cached = [role for role in ROLES if caches(recipe, role)]
    once = sum(len(one.ids) for r in cached for a in encoded.rows[r].encoded.values() for one in a)
    n_rows = " and ".join(f"{len(encoded.rows[role])} {role}" for role in ROLES)
    return Workload(kinds, once / ranks, f"of the {n_rows} rows, as this run draws them")


class _Lengths:
    """Of every row and answer of a role: tokens, and how many are scored."""

    def __init__(self, encoded: Mapping[Answer, Sequence[Encoded]], loss: Loss) -> None:
        self.of = {
            answer: [(len(one.ids), _scored(one, loss)) for one in rows]
            for answer, rows in encoded.items()
        }

    def shapes(self, draws: Sequence[Draw], role: Role) -> dict[Answer, Shape]:
        """What the collator would make of a micro-batch."""
        chosen = [draw.forget if role == "forget" else draw.retain for draw in draws]
        return {
            answer: _shape([rows[row] for row in chosen if row is not None])
            for answer, rows in self.of.items()
        }


def _shape(rows: Sequence[tuple[int, int]]) -> Shape:
    width = -(-max(length for length, _ in rows) // MULTIPLE) * MULTIPLE
    return Shape(len(rows), width, sum(scored for _, scored in rows))


def _scored(one: Encoded, loss: Loss) -> int:
    if loss.positions == "attended":
        return len(one.ids) - 1
    answer = sum(label != IGNORE_INDEX for label in one.labels[1:])
    return max(0, answer - (loss.positions == "answer_after_first"))


def _finetune(recipe: Recipe, ranks: int) -> Workload:
    data, setting = recipe.data, recipe.setting
    pairs = [pair for source in data.train for pair in _pairs(source, data)]
    if recipe.model.new is None:
        tokenizer: Any = load_tokenizer(recipe.model)
    else:
        sources = data.tokenizer_rows or data.train
        texts = [part for source in sources for pair in _pairs(source, data) for part in pair[:2]]
        tokenizer = new_tokenizer(texts, recipe.model.new.vocabulary)
    encoded = _encoder(tokenizer, data).pairs(
        [p.question for p in pairs], [p.answer for p in pairs]
    )
    rows = setting("per_device_train_batch_size")
    # The Trainer groups rows of like lengths; sorted ones are a little better.
    lengths = sorted(((len(one.ids), len(one.ids)) for one in encoded), reverse=True)
    batches = [_shape(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
    a_step = setting("gradient_accumulation_steps") * ranks
    steps, epochs = setting("max_steps"), setting("num_train_epochs")
    if steps <= 0:
        steps = math.ceil(epochs * math.ceil(len(batches) / a_step))
    kind = StepKind(steps)
    for shape in batches:
        kind.add({"retain": {ORIGINAL: shape}}, ranks)
    kind.tokens *= steps * a_step / len(batches)
    return Workload({FINETUNE: kind}, 0.0, f"of the {len(pairs)} rows, sorted by length")


def _assumed(recipe: Recipe, ranks: int, length: int, note: str) -> Workload:
    setting = recipe.setting
    rows, accumulation = (
        setting("per_device_train_batch_size"),
        setting("gradient_accumulation_steps"),
    )
    width = -(-length // MULTIPLE) * MULTIPLE
    shape = Shape(rows, width, max(1, round(SCORED * rows * length)))
    steps = setting("max_steps")
    kinds: dict[Kind, StepKind] = {}
    if recipe.kind == "finetune":
        kinds[FINETUNE] = StepKind(max(0, steps), {"retain": {ORIGINAL: shape}})
    else:
        schedule, losses = schedule_of(recipe), losses_of(recipe)
        of_role = {role: dict.fromkeys(losses[role].answers, shape) for role in ROLES}
        for step in range(steps if steps > 0 else LOOKED_AT):
            kind = schedule.roles(step)
            found = kinds.setdefault(kind, StepKind(0, {role: of_role[role] for role in kind}))
            found.steps += 1
    for found in kinds.values():
        found.tokens = float(tokens_of(found.worst) * accumulation * found.steps)
    return Workload(kinds, 0.0, note, counted=steps > 0)


LOOKED_AT = 1000
"""Steps that show every kind of step, where their number is not known."""


def losses_of(recipe: Recipe) -> dict[Role, Loss]:
    """Give the loss of each role."""
    objective = recipe.objective()
    return {"forget": objective.forget, "retain": objective.retain}


def caches(recipe: Recipe, role: Role) -> bool:
    """Tell whether the reference of a role is computed once, before the first step."""
    needed = recipe.objective().needs.get(role)
    return needed == "logp" and recipe.setting("reference") in ("auto", "precomputed")


def schedule_of(recipe: Recipe) -> Schedule:
    """Make the schedule of a recipe."""
    schedule: Any = SCHEDULES[recipe.setting("schedule")]
    made: Schedule = schedule(**recipe.setting("schedule_parameters"))
    return made


def _encoder(tokenizer: Any, data: DataSettings) -> Encoder:
    return Encoder(tokenizer, data.template, data.max_length, data.truncate, data.system)


def _pairs(source: str, data: DataSettings) -> list[QA]:
    rows = load_rows(source, folder=data.folder, seed=data.seed)
    return to_pairs(rows, source, data.question_column, data.answer_column)


def _chunks(sampler: ScheduledSampler, rows: int) -> Iterator[list[Draw]]:
    chunk = []
    for draw in sampler:
        chunk.append(draw)
        if len(chunk) == rows:
            yield chunk
            chunk = []
