"""Combinations that set the weights of the two losses from step to step: one backward pass.

What they learn from is the loss of a whole step over all ranks, so that it does not depend on how
a step is split; it is learned after the step, so a weight follows one step later.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from unlearn_llm.combine.base import COMBINATIONS, Combination, Step, check_number
from unlearn_llm.combine.vectors import Coefficients
from unlearn_llm.errors import UserError

EpsMeans = Literal["tolerance", "improvement"]


def dual_derivative(before: float, after: float, learning_rate: float, eps: float = 0.0) -> float:
    """Estimate the derivative in lambda of 1/2 |g_f + lambda g_r|^2 + lambda eps from a step.

    To first order (before - after) / learning_rate is <g_r, d> for the direction d of the step.

    Args:
        before, after: The retain loss on the same rows, before and after the step.

    Source: EUPMU, arXiv:2510.22124, eq. 8. Differs: no difference.
    """
    return (before - after) / learning_rate + eps


class ImplicitSurgery(Combination):
    """Surgery by one backward pass: minimises l_f + lambda l_r and learns lambda.

    After each step lambda <- clamp(lambda - rate * delta, 0, lambda_max), where delta is
    `dual_derivative` of the retain loss on the rows of the step: lambda rises where the step raised
    the retain loss by more than learning_rate * eps. At rest lambda is the multiplier of `surgery`
    for the direction that the optimiser makes of the gradient.

    Source: EUPMU, arXiv:2510.22124, sec. 4 and the authors' README. Differs: plain descent on
        lambda as in the paper (the released code: Adam with weight decay, log losses, no division
        by the rate); losses as they are, for logs need positive ones and multiply gradients by
        1/loss; bounded by `lambda_max`; steps of learning rate 0 teach nothing.
        `eps_means="improvement"` is the sign of the released code, which asks each step to lower
        the retain loss by eps, where the paper lets it rise by that.
    """

    sets_retain_weight = True

    def __init__(
        self,
        *,
        initial: float = 0.0,
        rate: float = 0.01,
        eps: float = 0.0,
        eps_means: EpsMeans = "tolerance",
        lambda_max: float = 10.0,
    ) -> None:
        if eps_means not in get_args(EpsMeans):
            raise UserError(
                f"eps_means: expected {' or '.join(get_args(EpsMeans))}, got {eps_means!r}."
            )
        self.rate = check_number("rate", rate, least=0.0)
        eps = check_number("eps", eps, least=0.0)
        self.signed_eps = eps if eps_means == "tolerance" else -eps
        self.lambda_max = check_number("lambda_max", lambda_max, least=0.0)
        self.lam = check_number("initial", initial, least=0.0, most=self.lambda_max)

    def weights(self) -> Coefficients:
        """The forget loss as it is, the retain loss times lambda."""
        return Coefficients(1.0, self.lam)

    def wants_loss_before(self, step: int) -> bool:
        """Each step is judged by its own rows."""
        return True

    def after_step(self, step: Step) -> None:
        """Take the retain loss of the same rows again: one forward pass without gradient."""
        if step.learning_rate > 0:
            after = step.window.loss("retain")
            self.learn(step.losses["retain"], after, step.learning_rate)

    def learn(self, before: float, after: float, learning_rate: float) -> None:
        """Move lambda by what a step did to the retain loss; a loss that is not finite is none."""
        delta = dual_derivative(before, after, learning_rate, self.signed_eps)
        if math.isfinite(delta):
            self.lam = min(self.lambda_max, max(0.0, self.lam - self.rate * delta))

    def observations(self) -> dict[str, float]:
        """Lambda after the step."""
        return {"combine/lambda": self.lam}

    def state_dict(self) -> dict[str, Any]:
        """Lambda."""
        return {"lambda": self.lam}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a lambda."""
        self.lam = state["lambda"]


class FastImplicitSurgery(ImplicitSurgery):
    """Implicit surgery without the pass after the step: the next step's retain loss stands in.

    Those are other rows, so delta is noisier and holds the difference between the rows.

    Source: EUPMU, released code, "eu_fast" (w0 = 1 there: `initial`). Differs: as ImplicitSurgery;
        lambda follows one step later, because the loss of a step is known after its last
        micro-batch.
    """

    def __init__(
        self,
        *,
        initial: float = 1.0,
        rate: float = 0.01,
        eps: float = 0.0,
        eps_means: EpsMeans = "tolerance",
        lambda_max: float = 10.0,
    ) -> None:
        super().__init__(
            initial=initial, rate=rate, eps=eps, eps_means=eps_means, lambda_max=lambda_max
        )
        self._previous: dict[str, float] = {}

    def wants_loss_before(self, step: int) -> bool:
        """The losses of the backward passes will do."""
        return False

    def after_step(self, step: Step) -> None:
        """Judge the step before this one."""
        if self._previous.get("learning_rate", 0.0) > 0:
            self.learn(
                self._previous["loss"], step.losses["retain"], self._previous["learning_rate"]
            )
        self._previous = {"loss": step.losses["retain"], "learning_rate": step.learning_rate}

    def state_dict(self) -> dict[str, Any]:
        """Lambda and the step that is not judged yet."""
        return {**super().state_dict(), "previous": dict(self._previous)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with both."""
        super().load_state_dict(state)
        self._previous = dict(state["previous"])


class PDU(Combination):
    """Minimises the forget loss subject to retain loss <= eps, by a dual variable.

    The step's loss is forget_weight l_f + lambda (l_r - eps); after it
    lambda <- max(0, lambda + rate (l_r - eps)), frozen for the first `warmup_steps`.
    eps must exceed the retain loss at the start; the defaults are the published ones for TOFU.

    Source: PDU, arXiv:2506.05314. Differs: one dual update per optimiser step from the loss of
        the whole step on all ranks (the released trainer updates in every micro-batch, on each
        rank by itself); any forget loss (theirs flattens logit margins, one position off); warm-up
        counted in steps.
    """

    sets_retain_weight = True

    def __init__(
        self,
        *,
        initial: float = 100.0,
        eps: float = 0.3,
        rate: float = 5.0,
        warmup_steps: int = 0,
    ) -> None:
        self.lam = check_number("initial", initial, least=0.0)
        self.eps = check_number("eps", eps)
        self.rate = check_number("rate", rate, least=0.0)
        self.frozen = int(check_number("warmup_steps", warmup_steps, least=0))

    def weights(self) -> Coefficients:
        """The forget loss as it is, the retain loss times lambda."""
        return Coefficients(1.0, self.lam)

    def after_step(self, step: Step) -> None:
        """Ascend in lambda."""
        if self.frozen > 0:
            self.frozen -= 1
        else:
            self.lam = max(0.0, self.lam + self.rate * (step.losses["retain"] - self.eps))

    def observations(self) -> dict[str, float]:
        """Lambda after the step."""
        return {"combine/lambda": self.lam}

    def state_dict(self) -> dict[str, Any]:
        """Lambda and how long it stays."""
        return {"lambda": self.lam, "frozen": self.frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with both."""
        self.lam, self.frozen = state["lambda"], state["frozen"]


class FAMO(Combination):
    """Weighs the losses so that both fall at the same relative speed.

    z = softmax(w); the step's gradient is that of sum z_i log l_i, scaled so that its weights
    z_i / l_i add up to 1; after it w moves by Adam against J_softmax^T (log l(t) - log l(t+1)).
    Needs losses above 0 (not ga).

    Source: FAMO, arXiv:2306.03792, as in EUPMU's repository (rate 0.025, decay 1e-5). Differs:
        l_i in the weights is the loss of the step before (1 in the first), because the loss of a
        step is known after its last micro-batch; l(t+1) is the next step's loss, on other rows
        (no extra pass).
    """

    sets_retain_weight = True

    def __init__(self, *, rate: float = 0.025, decay: float = 1e-5) -> None:
        self.rate = check_number("rate", rate, least=0.0)
        self.decay = check_number("decay", decay, least=0.0)
        self._logits, self._first, self._second = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        self._logs: list[float] | None = None  # log losses of the step before
        self._n_updates = 0

    def weights(self) -> Coefficients:
        """z_i / l_i, scaled to add up to 1."""
        forget, retain = self._shares()
        if self._logs is not None:
            forget, retain = forget * math.exp(-self._logs[0]), retain * math.exp(-self._logs[1])
        return Coefficients(forget / (forget + retain), retain / (forget + retain))

    def after_step(self, step: Step) -> None:
        """Move w by what the step before this one did to both losses."""
        losses = [step.losses["forget"], step.losses["retain"]]
        if min(losses) <= 0:
            raise UserError(f"combine: famo takes logarithms of losses; got {losses}. Not with ga.")
        logs = [math.log(loss) for loss in losses]
        if self._logs is not None:
            shares = self._shares()
            falls = [before - now for before, now in zip(self._logs, logs, strict=True)]
            mean = shares[0] * falls[0] + shares[1] * falls[1]
            self._adam([z * (fall - mean) for z, fall in zip(shares, falls, strict=True)])
        self._logs = logs

    def observations(self) -> dict[str, float]:
        """The forget side's share z."""
        return {"combine/forget_share": self._shares()[0]}

    def state_dict(self) -> dict[str, Any]:
        """Logits, their moments, the losses before."""
        return {
            "logits": list(self._logits),
            "first": list(self._first),
            "second": list(self._second),
            "logs": self._logs,
            "n_updates": self._n_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with all of them."""
        self._logits = list(state["logits"])
        self._first, self._second = list(state["first"]), list(state["second"])
        self._logs, self._n_updates = state["logs"], state["n_updates"]

    def _shares(self) -> tuple[float, float]:
        forget = 1 / (1 + math.exp(self._logits[1] - self._logits[0]))
        return forget, 1 - forget

    def _adam(self, gradient: list[float]) -> None:
        self._n_updates += 1
        for i, plain in enumerate(gradient):
            slope = plain + self.decay * self._logits[i]
            self._first[i] = 0.9 * self._first[i] + 0.1 * slope
            self._second[i] = 0.999 * self._second[i] + 0.001 * slope**2
            mean = self._first[i] / (1 - 0.9**self._n_updates)
            spread = math.sqrt(self._second[i] / (1 - 0.999**self._n_updates))
            self._logits[i] -= self.rate * mean / (spread + 1e-8)


COMBINATIONS.add("implicit_surgery", ImplicitSurgery)
COMBINATIONS.add("implicit_surgery_fast", FastImplicitSurgery)
COMBINATIONS.add("pdu", PDU)
COMBINATIONS.add("famo", FAMO)
