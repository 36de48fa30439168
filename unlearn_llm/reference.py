"""The frozen model that a loss compares with: cached numbers, an adapter as it was, or a copy."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from unlearn_llm.dataset import Collator, EncodedRows
from unlearn_llm.errors import UserError
from unlearn_llm.objective import Needs, Positions
from unlearn_llm.scoring import score
from unlearn_llm.types import IGNORE_INDEX, Answer, Role, Scored, Sequences


class Reference(Protocol):
    """What the model said before unlearning began."""

    def __call__(
        self,
        role: Role,
        sequences: Mapping[Answer, Sequences],
        positions: Positions,
        layers: Sequence[int] = (),
    ) -> Mapping[Answer, Scored]:
        """Score sequences of a role with the frozen model, without gradient."""
        ...


class Precomputed:
    """Log-probabilities of every row, computed once. No second model, whatever the sharding.

    Valid because the answers of a row never change: a refusal is fixed by (seed, row).
    """

    def __init__(self, token_logps: Mapping[Role, Mapping[Answer, Sequence[Tensor]]]) -> None:
        """Take, by role and answer, the log-probabilities of each row's scored tokens."""
        self.token_logps = token_logps

    @classmethod
    def compute(
        cls,
        model: nn.Module,
        rows: Mapping[Role, EncodedRows],
        collator: Collator,
        batch_size: int,
        accelerator: Accelerator,
    ) -> "Precomputed":
        """Run the model once over all rows of the given roles; the ranks share the work."""
        return cls(
            {
                role: _score_rows(model, encoded, collator, batch_size, accelerator)
                for role, encoded in rows.items()
            }
        )

    def state(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Give what `from_state` takes: by role and answer all values, and how many are a row's."""
        return {
            role: {
                answer: {
                    "values": torch.cat(list(rows)),
                    "lengths": torch.tensor([len(row) for row in rows]),
                }
                for answer, rows in answers.items()
            }
            for role, answers in self.token_logps.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[Any, Any]) -> "Precomputed":
        """Make one from what `state` gave."""
        return cls(
            {
                role: {
                    answer: saved["values"].split(saved["lengths"].tolist())
                    for answer, saved in answers.items()
                }
                for role, answers in state.items()
            }
        )

    def __call__(
        self,
        role: Role,
        sequences: Mapping[Answer, Sequences],
        positions: Positions,
        layers: Sequence[int] = (),
    ) -> dict[Answer, Scored]:
        """Look the rows up; of hidden states nothing is kept."""
        scored = {}
        for answer, batch in sequences.items():
            mask = batch["labels"][:, 1:] != IGNORE_INDEX
            rows = self.token_logps[role][answer]
            values = torch.cat([rows[row] for row in batch["rows"].tolist()])
            full = torch.zeros(mask.shape, device=mask.device)
            scored[answer] = Scored(
                mask,
                batch["input_ids"][:, 1:],
                token_logps=full.masked_scatter(mask, values.to(mask.device)),
            )
        return scored


class DisabledAdapter:
    """The model itself with its adapter switched off: the base model, at no extra memory.

    Right only for a fresh adapter; a continued one differs from its base from the start (trap 12).
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        role: Role,
        sequences: Mapping[Answer, Sequences],
        positions: Positions,
        layers: Sequence[int] = (),
    ) -> dict[Answer, Scored]:
        """Score with the base model."""
        with frozen(self.model), self.model.disable_adapter():
            return score(self.model, sequences, positions, layers)


class StartingWeights:
    """The model itself, with what trains put back to its start while it is asked.

    For an adapter that is trained further: the model at the start is its base with the adapter of
    then, so the adapter alone is kept twice, whatever the base takes (trap 12).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.at_start = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def __call__(
        self,
        role: Role,
        sequences: Mapping[Answer, Sequences],
        positions: Positions,
        layers: Sequence[int] = (),
    ) -> dict[Answer, Scored]:
        """Score with the weights of the start."""
        with frozen(self.model), self._put_back():
            return score(self.model, sequences, positions, layers)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        # Other storage, not other values: graphs that wait for their backward pass keep theirs.
        parameters = dict(self.model.named_parameters())
        current = {name: parameters[name].data for name in self.at_start}
        try:
            for name, start in self.at_start.items():
                self.at_start[name] = start.to(current[name])  # its device, once it has moved
                parameters[name].data = self.at_start[name]
            yield
        finally:
            for name, data in current.items():
                parameters[name].data = data


class FrozenCopy:
    """A second copy of the model as it was at the start."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)

    def __call__(
        self,
        role: Role,
        sequences: Mapping[Answer, Sequences],
        positions: Positions,
        layers: Sequence[int] = (),
    ) -> dict[Answer, Scored]:
        """Score with the copy, on the device of the sequences."""
        device = next(iter(sequences.values()))["input_ids"].device
        self.model.to(device)
        with frozen(self.model):
            return score(self.model, sequences, positions, layers)


def choose_reference(
    choice: str,
    needs: Mapping[Role, Needs],
    model: Any,
    rows: Mapping[Role, EncodedRows],
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator,
) -> Reference | None:
    """Make the cheapest reference that gives what the losses need.

    Args:
        choice: "auto", or one of the kinds by name (UnlearnConfig.reference).
        needs: What the loss of each role reads of the reference; roles without need left out.
        model: The model as it is before training.

    Raises:
        UserError: the kind asked for cannot give what is needed.
    """
    if not needs:
        return None
    if choice == "precomputed" and set(needs.values()) != {"logp"}:
        raise UserError(
            "reference: precomputed keeps log-probabilities only, but this objective compares "
            "whole distributions or hidden states. Use reference: auto."
        )
    constant = {role: rows[role] for role, need in needs.items() if need == "logp"}
    cached: Reference | None = None
    if choice in ("precomputed", "auto") and constant:
        cached = Precomputed.compute(model, constant, collator, batch_size, accelerator)
        if len(constant) == len(needs):
            return cached
    fresh = has_fresh_adapter(model)
    if choice == "adapter" and not fresh:
        raise UserError(
            "reference: adapter needs a fresh LoRA adapter that trains alone; otherwise the base "
            "model is not the model at the start. Use reference: frozen."
        )
    use_adapter = choice == "adapter" or (choice == "auto" and fresh)
    live: Reference
    if use_adapter:
        live = DisabledAdapter(model)
    else:  # the base under an adapter needs no second copy
        live = (StartingWeights if isinstance(model, PeftModel) else FrozenCopy)(model)
    if cached is None:
        return live
    return ByRole({role: cached if role in constant else live for role in needs})


class ByRole:
    """Another kind of reference for each role: what is constant is looked up, the rest computed."""

    def __init__(self, references: Mapping[Role, Reference]) -> None:
        self.references = references

    def __call__(
        self,
        role: Role,
        sequences: Mapping[Answer, Sequences],
        positions: Positions,
        layers: Sequence[int] = (),
    ) -> Mapping[Answer, Scored]:
        """Ask the role's own reference."""
        return self.references[role](role, sequences, positions, layers)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout and without gradient, then go back to the mode before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def has_fresh_adapter(model: nn.Module) -> bool:
    """Is the model, with its adapter switched off, the model at the start, and will it stay so?

    True if the B matrices of its LoRA adapter are all zero, and nothing trains that
    `disable_adapter` does not switch off (adapters, and copies made by `modules_to_save`).
    """
    matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
    switched_off = all(
        "lora_" in name or "modules_to_save" in name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    return bool(matrices) and switched_off and not any(bool(b.any()) for b in matrices)


def _score_rows(
    model: nn.Module,
    encoded: EncodedRows,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[Answer, list[Tensor]]:
    # Longest first: batches need little padding, and memory runs out at once or never.
    order = sorted(range(len(encoded)), key=lambda row: encoded.lengths[row], reverse=True)
    ranks = accelerator.num_processes
    mine = order[accelerator.process_index :: ranks]
    found: list[tuple[Answer, int, Tensor]] = []
    # As many passes on every rank: where weights are spread, a pass needs all of them.
    starts = tqdm(
        range(0, math.ceil(len(order) / ranks), batch_size),
        desc="reference log-probabilities",
        disable=not accelerator.is_main_process,
        leave=False,
    )
    for start in starts:
        batch_rows = mine[start : start + batch_size] or order[:1]
        samples = [encoded[row] for row in batch_rows]
        sequences = {
            answer: _to(collator.sequences([sample[answer] for sample in samples]), accelerator)
            for answer in samples[0]
        }
        with frozen(model), accelerator.autocast():
            for answer, scored in score(model, sequences).items():
                for row, logps, mask in zip(
                    batch_rows, scored.token_logps, scored.mask, strict=True
                ):
                    found.append((answer, row, logps[mask].cpu()))
    table = {(answer, row): logps for answer, row, logps in gather_object(found)}
    return {
        answer: [table[answer, row] for row in range(len(encoded))] for answer in encoded.encoded
    }


def _to(sequences: Sequences, accelerator: Accelerator) -> Sequences:
    moved = {key: tensor.to(accelerator.device) for key, tensor in sequences.items()}  # type: ignore[attr-defined]
    return Sequences(**moved)  # type: ignore[typeddict-item]
