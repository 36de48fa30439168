"""The words that every floor uses: roles, answers, sequences, scored sequences. No logic."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Literal, Protocol, TypedDict

from torch import Tensor

Role = Literal["forget", "retain"]
ROLES: tuple[Role, ...] = ("forget", "retain")
Answer = str
IGNORE_INDEX = -100


class Sequences(TypedDict):
    """Tokenised prompt+answer pairs, padded on the right.

    A plain dict, because the Trainer moves only dicts of tensors to the device.
    """

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64, 1 on tokens. Made by position, never by comparing ids with the pad id."""
    labels: Tensor
    """(B, T) int64, IGNORE_INDEX where no loss is taken."""
    rows: Tensor
    """(B,) int64, index of the row in its data set."""


Batch = dict[Role, dict[Answer, Sequences]]


class Distribution(Protocol):
    """The model's next-token distributions at N chosen positions, never materialised at once."""

    vocabulary: int

    def map(self, function: Callable[..., Tensor], *others: "Distribution | Tensor") -> Tensor:
        """Apply `function(logps, *others)` to chunks of positions and join the results.

        Args:
            function: Gets float32 log-probabilities (n, V), then the same n positions of each of
                `others` (log-probabilities of a distribution, rows of a tensor); returns (n,).
            others: Distributions over the same positions, or tensors of N rows.

        Returns:
            (N,) float32. The (n, V) tensors are recomputed in the backward pass, not kept.
        """
        ...

    def token_logps(self) -> Tensor:
        """(N,) log-probabilities in nats of the tokens that came next."""
        ...

    def token_log_odds(self) -> Tensor:
        """(N,) log(p / (1 - p)) in nats, p as in `token_logps`, after which it costs little."""
        ...

    def divergence_from_uniform(self) -> Tensor:
        """(N,) KL(uniform || model) in nats. Costs little after `token_logps`."""
        ...

    def margin(self) -> Tensor:
        """(N,) largest logit minus the mean of all, in nats; of several largest, one is taken."""
        ...

    def kl_from(self, reference: "Distribution") -> Tensor:
        """(N,) KL(reference || model) in nats; the reference over the same positions."""
        ...

    def cross_entropy_from(self, reference: "Distribution", *, lowered: float) -> Tensor:
        """(N,) cross-entropy in nats under the reference over the same positions, a constant.

        Args:
            lowered: What is taken from the reference's logits of the tokens that came next.
        """
        ...


class Scored:
    """What a model says about B sequences of T tokens.

    Attributes:
        mask: (B, T-1) bool, True where the next token counts: the answer's tokens, or every
            real token where a loss asks for `positions="attended"` (objective.Loss).
        targets: (B, T-1) int64, the next token at each position.
        distribution: The next-token distributions at the True positions of `mask`, in row-major
            order; None where only log-probabilities were kept (precomputed references).
        hidden: By decoder layer (N, H), its output at the True positions of `mask`; only of the
            layers that a loss asks for.
    """

    def __init__(
        self,
        mask: Tensor,
        targets: Tensor,
        distribution: Distribution | None = None,
        token_logps: Tensor | None = None,
        hidden: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.mask = mask
        self.targets = targets
        self.distribution = distribution
        self.hidden: Mapping[int, Tensor] = hidden or {}
        if token_logps is not None:
            self.token_logps = token_logps  # fills the cached property

    @cached_property
    def token_logps(self) -> Tensor:
        """(B, T-1) log-probabilities of the targets in nats, 0 where `mask` is False."""
        if self.distribution is None:
            raise ValueError("Scored needs a distribution or token_logps; got neither.")
        return self.spread(self.distribution.token_logps())

    @property
    def logp(self) -> Tensor:
        """(B,) log-probability of each whole answer in nats."""
        return self.token_logps.sum(-1)

    @property
    def length(self) -> Tensor:
        """(B,) number of scored tokens, int64."""
        return self.mask.sum(-1)

    def spread(self, values: Tensor) -> Tensor:
        """Put (N,) values of the True positions back into (B, T-1), 0 elsewhere."""
        full = values.new_zeros(self.mask.shape)
        return full.masked_scatter(self.mask, values)
