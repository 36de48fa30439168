"""What a training step reads: encoded rows by role, and batches padded to the longest row."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from unlearn_llm.encode import Encoded, Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.resources import EVAL
from unlearn_llm.rows import QA
from unlearn_llm.schedule import Draw
from unlearn_llm.types import IGNORE_INDEX, ROLES, Answer, Batch, Role, Sequences

ORIGINAL: Answer = "original"
IDK: Answer = "idk"
RANDOM: Answer = "random"
ALTERNATE: Answer = "alternate"
ABSENT: dict[Answer, str] = {ALTERNATE: " Every row needs another answer in a column `alternate`."}
"""What to do about an answer that the data does not give."""


def read_refusals(path: str | Path | None = None) -> list[str]:
    """Read refusal lines, one per line; by default the package's own `eval/refusals.txt`."""
    path = Path(path) if path is not None else EVAL / "refusals.txt"
    if not path.is_file():
        raise UserError(f"There is no file {path} with refusal answers (data.refusals).")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    refusals = [line for line in lines if line]
    if not refusals:
        raise UserError(f"{path} holds no refusal answers. Write one per line.")
    return refusals


def refusal_of(row: int | str, refusals: Sequence[str], seed: int) -> str:
    """Choose the refusal of a row: the same in every epoch, on every rank, after every resume.

    Differs: the authors draw with `torch.manual_seed(row)`, which resets the global generator.
    """
    return random.Random(f"{seed}/refusal/{row}").choice(refusals)


def random_answer_of(row: int | str, own: str, answers: Sequence[str], seed: int) -> str:
    """Choose an answer that is not the row's own: fixed by (seed, row), as `refusal_of` is.

    Raises:
        UserError: all answers are the row's own.
    """
    start = random.Random(f"{seed}/random/{row}").randrange(len(answers))
    for step in range(len(answers)):
        answer = answers[(start + step) % len(answers)]
        if answer != own:
            return answer
    raise UserError(f"Row {row} has the only answer that a random one could be drawn from.")


class EncodedRows(Dataset):
    """The rows of one role, each with the answers that its loss asks for."""

    def __init__(
        self,
        pairs: Sequence[QA],
        encoder: Encoder,
        answers: Sequence[Answer] = (ORIGINAL,),
        *,
        refusals: Sequence[str] = (),
        answers_elsewhere: Sequence[str] = (),
        seed: int = 0,
        alternates: Mapping[Answer, Sequence[str]] | None = None,
    ) -> None:
        """Encode every row once.

        Args:
            pairs: Questions with their original answers.
            answers: Names of the answers to encode: "original", "idk", "random", "alternate" (if
                every pair has one), or a key of `alternates`.
            refusals: What "idk" is chosen from.
            answers_elsewhere: What "random" is chosen from.
            alternates: Other answers, one per row each.

        Raises:
            UserError: an unknown answer, or rows that cannot be encoded.
        """
        texts: dict[Answer, Sequence[str]] = {
            ORIGINAL: [pair.answer for pair in pairs],
            **(alternates or {}),
        }
        if IDK in answers and refusals:
            texts[IDK] = [refusal_of(row, refusals, seed) for row in range(len(pairs))]
        if RANDOM in answers and answers_elsewhere:
            texts[RANDOM] = [
                random_answer_of(row, pair.answer, answers_elsewhere, seed)
                for row, pair in enumerate(pairs)
            ]
        alternate = [pair.alternate for pair in pairs if pair.alternate is not None]
        if len(alternate) == len(pairs):
            texts.setdefault(ALTERNATE, alternate)
        questions = [pair.question for pair in pairs]
        self.encoded: dict[Answer, list[Encoded]] = {}
        for answer in answers:
            if answer not in texts:
                raise UserError(
                    f"The loss asks for the answer {answer!r}; the data gives {', '.join(texts)}."
                    f"{ABSENT.get(answer, '')}"
                )
            self.encoded[answer] = encoder.pairs(questions, texts[answer])
        self.lengths = [
            max(len(rows[row].ids) for rows in self.encoded.values()) for row in range(len(pairs))
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[Answer, tuple[int, Encoded]]:
        return {answer: (row, rows[row]) for answer, rows in self.encoded.items()}


class RoleDataset(Dataset):
    """Forget and retain rows under one index: a Draw names a row of either or of both."""

    def __init__(self, forget: EncodedRows, retain: EncodedRows) -> None:
        self.rows: dict[Role, EncodedRows] = {"forget": forget, "retain": retain}

    @classmethod
    def encode(
        cls,
        pairs: Mapping[Role, Sequence[QA]],
        encoder: Encoder,
        answers: Mapping[Role, Sequence[Answer]],
        *,
        refusals: Sequence[str],
        seed: int,
    ) -> "RoleDataset":
        """Encode the rows of both roles; random answers are those of retain rows."""
        kept = [pair.answer for pair in pairs["retain"]]
        forget, retain = (
            EncodedRows(
                pairs[role],
                encoder,
                answers[role],
                refusals=refusals,
                answers_elsewhere=kept,
                seed=seed,
            )
            for role in ROLES
        )
        return cls(forget, retain)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def __getitem__(self, draw: Draw) -> dict[Role, dict[Answer, tuple[int, Encoded]]]:
        drawn: dict[Role, int | None] = {"forget": draw.forget, "retain": draw.retain}
        return {role: self.rows[role][row] for role, row in drawn.items() if row is not None}


@dataclass(frozen=True)
class Collator:
    """Pads a batch to its longest row, rounded up, and marks padding by position.

    Marking by position keeps a real end token visible when the pad token is the same id
    (open-unlearning compares ids and hides every `<|eot_id|>`).
    """

    pad_id: int
    multiple: int = 4
    """Lengths are rounded up to a multiple of this: few distinct shapes, aligned kernels.

    TOFU rows have about 70 tokens: 8 would compute 3% more of them.
    """

    def pad(self, lists: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        """Stack lists of numbers into (B, T), filled up on the right."""
        width = -(-max(map(len, lists)) // self.multiple) * self.multiple
        padded = torch.full((len(lists), width), fill)
        for row, numbers in enumerate(lists):
            padded[row, : len(numbers)] = torch.tensor(numbers)
        return padded

    def sequences(self, rows: Sequence[tuple[int, Encoded]]) -> Sequences:
        """Pad (row number, encoded) pairs."""
        ids = [encoded.ids for _, encoded in rows]
        return Sequences(
            input_ids=self.pad(ids, self.pad_id),
            attention_mask=self.pad([[1] * len(tokens) for tokens in ids], 0),
            labels=self.pad([encoded.labels for _, encoded in rows], IGNORE_INDEX),
            rows=torch.tensor([row for row, _ in rows]),
        )

    def __call__(self, samples: Sequence[dict[Role, dict[Answer, tuple[int, Encoded]]]]) -> Batch:
        """Collate what RoleDataset gives."""
        return {
            role: {
                answer: self.sequences([sample[role][answer] for sample in samples])
                for answer in samples[0][role]
            }
            for role in samples[0]
        }
