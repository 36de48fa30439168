"""Unlearning methods for a classifier, and the three optimisers that each is run with.

A method is a loss for each role, an order of the steps and, for two of them, a mask. An optimiser
differs from the others in nothing but what it remembers between the steps of the two roles:

shared      AdamW as in pre-training, one state that averages both gradients
dual        DualAdamW, one state for each role
dual_plus   DualAdamWPlus, a shared base and a delta for each role, bounded (`max_update=1`)

All have the betas and the decay of pre-training, the same rate for retain steps and a rate of
their own for forget steps; both fall along half a cosine. FT and GA have one role only, for which
`dual` takes the same steps as `shared`: they stand once.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.optim import Optimizer
from vision_task import BETAS, CLASSES, RATE, WEIGHT_DECAY, Images, Task, batches, half_cosine

from unlearn_llm.masks import Mask
from unlearn_llm.masks.salun import SalUn
from unlearn_llm.masks.sfron import SFRon
from unlearn_llm.optim import DualAdamW, DualAdamWPlus, set_role
from unlearn_llm.types import ROLES, Role

OptimizerName = Literal["shared", "dual", "dual_plus"]

EPOCHS = 10
"""Passes over the retain set; over the forget set as many, but for SFRon."""
RETAIN_RATE = RATE
"""As in pre-training; a tenth of it does not make good what forgetting breaks."""
FORGET_EVERY = 5
"""SFRon forgets once before this many retain steps."""


class Batch(NamedTuple):
    """What a loss may look at."""

    logits: Tensor
    """(B, classes)"""
    labels: Tensor
    """(B,)"""
    teacher: Tensor
    """(B, classes) logits of the original model."""
    progress: float
    """From 0 to 1 over the run."""
    draws: torch.Generator


Loss = Callable[[Batch], Tensor]


class Method(NamedTuple):
    """One row of the table, without its optimiser."""

    forget: Loss | None
    retain: Loss | None
    mask: Mask | None = None
    interleaved: bool = False
    """A forget step every `FORGET_EVERY` retain steps, instead of pass after pass."""
    clip: float | None = None
    """Largest norm of a forget step's gradient."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """What it trains."""
        losses = {"forget": self.forget, "retain": self.retain}
        return tuple(role for role in ROLES if losses[role])


def learn(batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(batch.logits, batch.labels)


def ascend(batch: Batch) -> Tensor:
    """Gradient ascent: cross-entropy, maximised."""
    return -cross_entropy(batch.logits, batch.labels)


def random_labels(batch: Batch) -> Tensor:
    """Cross-entropy of labels that are drawn anew at every step, the true one among them.

    Source: CityU-MLO/DualOptim@0e2737f ImageClassification/unlearn/RL.py. Differs: no difference.
    """
    drawn = torch.randint(CLASSES, batch.labels.shape, generator=batch.draws)
    return cross_entropy(batch.logits, drawn)


def leave_teacher(batch: Batch) -> Tensor:
    """SCRUB's forget side: -KL(teacher || student), mean over images.

    Source: SCRUB, arXiv:2302.09880; CityU-MLO/DualOptim@0e2737f unlearn/scrub.py. Differs: no
        difference to the latter, which has no temperature and forgets in every epoch.
    """
    return -_divergence(batch)


def stay_with_teacher(batch: Batch, *, gamma: float = 1.0, alpha: float = 0.5) -> Tensor:
    """SCRUB's retain side: gamma times cross-entropy plus alpha times KL(teacher || student)."""
    return gamma * learn(batch) + alpha * _divergence(batch)


def adaptive_ascent(batch: Batch, *, strength: float = 25.0, power: float = 0.5) -> Tensor:
    """SFRon's forget side: ascent, with less weight on what is forgotten already.

    An image's weight is 1 / loss^power, without gradient and with mean 1 over the batch; the whole
    is multiplied by `strength`, which falls along half a cosine.

    Source: SFRon, arXiv:2409.19732; CityU-MLO/DualOptim@0e2737f unlearn/sfron.py. Differs: a
        floor under the loss of 1e-12 instead of 1e-15 added to its power. The exponential average
        of the weights is left out, as its decay of 1 leaves it out there.
    """
    losses = cross_entropy(batch.logits, batch.labels, reduction="none")
    weights = losses.detach().clamp_min(1e-12) ** -power
    weights = weights / weights.mean()
    return -strength * half_cosine(batch.progress) * (weights * losses).mean()


def _divergence(batch: Batch) -> Tensor:
    student, teacher = batch.logits.log_softmax(1), batch.teacher.log_softmax(1)
    return kl_div(student, teacher, reduction="batchmean", log_target=True)


def choose_mask(method: Method, original: nn.Module, task: Task) -> list[Tensor]:
    """Choose which entries may move; nothing is said for a method without a mask."""
    return method.mask.choose(ImageGradients(original, task)) if method.mask else []


class ImageGradients:
    """Gradients of the original model's cross-entropy, for `unlearn_llm.masks`."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model = model
        self.images: dict[Role, Images] = {"forget": task.forget, "retain": task.retain}

    def mean(self, role: Role) -> list[Tensor]:
        """Gradient of the mean over images."""
        return self._of(self.images[role])

    def mean_square(self, role: Role) -> list[Tensor]:
        """Mean over images of the squared gradient of each."""
        images = self.images[role]
        sums = [torch.zeros_like(param) for param in self.model.parameters()]
        for row in torch.arange(len(images.labels)).split(1):
            for total, gradient in zip(sums, self._of(images.at(row)), strict=True):
                total.addcmul_(gradient, gradient)
        return [total / len(images.labels) for total in sums]

    def _of(self, images: Images) -> list[Tensor]:
        loss = cross_entropy(self.model(images.pixels), images.labels)
        return list(torch.autograd.grad(loss, list(self.model.parameters())))


METHODS: dict[str, Method] = {
    "FT": Method(None, learn),
    "GA": Method(ascend, None),
    "GA+FT": Method(ascend, learn),
    "RL": Method(random_labels, learn),
    "SCRUB": Method(leave_teacher, stay_with_teacher),
    "SalUn": Method(random_labels, learn, mask=SalUn()),
    "SFRon": Method(adaptive_ascent, learn, mask=SFRon(), interleaved=True, clip=7.0),
}


def optimizers_of(method: Method) -> tuple[OptimizerName, ...]:
    """Name what a method is run with; with one role there is nothing to keep apart."""
    return ("shared", "dual", "dual_plus") if len(method.roles) == 2 else ("shared",)


def make_optimizer(name: OptimizerName, model: nn.Module) -> Optimizer:
    """Build one of the three; `unlearn` sets its rate at every step."""
    params = model.parameters()
    if name == "shared":
        return torch.optim.AdamW(params, betas=BETAS, weight_decay=WEIGHT_DECAY)
    if name == "dual":
        return DualAdamW(params, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return DualAdamWPlus(
        params, betas=BETAS, base_betas=BETAS, weight_decay=WEIGHT_DECAY, max_update=1.0
    )


def unlearn(
    original: nn.Module,
    task: Task,
    method: Method,
    optimizer_name: OptimizerName,
    rate: float,
    *,
    mask: Sequence[Tensor] = (),
    seed: int,
    epochs: int = EPOCHS,
) -> nn.Module:
    """Run a method on a copy of the original model.

    Args:
        rate: Of forget steps; of FT's retain steps, which has no others.
        mask: Of `choose_mask`.
    """
    model = deepcopy(original)
    optimizer = make_optimizer(optimizer_name, model)
    rates = {"forget": rate, "retain": RETAIN_RATE if method.forget else rate}
    with torch.no_grad():
        teachers = {role: original(getattr(task, role).pixels) for role in ROLES}
    draws = torch.Generator().manual_seed(seed)
    plan = list(steps(method, task, epochs, draws))
    for number, (role, rows) in enumerate(plan):
        progress = number / len(plan)
        set_role(optimizer, role)
        optimizer.param_groups[0]["lr"] = rates[role] * half_cosine(progress)
        images = getattr(task, role).at(rows)
        batch = Batch(model(images.pixels), images.labels, teachers[role][rows], progress, draws)
        loss = method.forget if role == "forget" else method.retain
        assert loss is not None  # `steps` has none of a role without a loss
        optimizer.zero_grad()
        loss(batch).backward()
        held = mask if method.mask and role in method.mask.roles else []
        take_step(model, optimizer, held, method.clip if role == "forget" else None)
    return model


def steps(
    method: Method, task: Task, epochs: int, draws: torch.Generator
) -> Iterator[tuple[Role, Tensor]]:
    """Give role and rows of every step: forget pass, retain pass; SFRon: one in every few."""
    sizes = {"forget": len(task.forget.labels), "retain": len(task.retain.labels)}
    if not method.interleaved:
        for _ in range(epochs):
            for role in method.roles:
                yield from ((role, rows) for rows in batches(sizes[role], draws))
        return
    forget = (rows for _ in iter(int, 1) for rows in batches(sizes["forget"], draws))
    retain = (rows for _ in range(epochs) for rows in batches(sizes["retain"], draws))
    for number, rows in enumerate(retain):
        if number % FORGET_EVERY == 0:
            yield "forget", next(forget)
        yield "retain", rows


def take_step(
    model: nn.Module, optimizer: Optimizer, mask: Sequence[Tensor], clip: float | None
) -> None:
    """Mask, then clip, then step; entries outside the mask, if there is one, keep their value.

    A gradient of 0 would not hold them: decay and the momentum of other steps move them.
    """
    params = list(model.parameters()) if mask else []
    before = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, free in zip(params, mask, strict=True):
            assert param.grad is not None
            param.grad *= free
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for param, free, old in zip(params, mask, before, strict=True):
            param.copy_(torch.where(free, param, old))
