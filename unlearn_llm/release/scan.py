"""What may not stand in files that are shared: pickles, and the text that was to be forgotten.

Weights are not read as text: they are numbers, and what they remember is the matter of
`unlearn eval` and `unlearn attack`. A tokenizer that was trained on the rows may hold their words.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import decoders

from unlearn_llm.errors import UserError
from unlearn_llm.rows import QA, normal

WINDOW = 24
"""Characters that a file and a row must have in common."""
STRIDE = 8
"""Rows are looked for by every eighth such window: what shares 31 characters is always found."""
SHORTEST = 12
"""Shorter rows are words that a vocabulary may well have; longer ones are looked for whole."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x1f\x8b")
"""How pickles begin, and archives that torch.save and others put them into."""


def check_no_pickles(folder: Path) -> None:
    """Refuse files that run code when they are loaded, by their names or by how they begin."""
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            begins = opened.read(4)
        if file.suffix in PICKLED or begins.startswith(MAGIC):
            raise UserError(
                f"{file} is a pickle or an archive, which can run code when it is loaded. Only "
                "safetensors are released: save the model as such, and remove the file."
            )


def check_no_forgotten_text(folder: Path, pairs: Sequence[QA]) -> None:
    """Refuse files with text of the forget set in them; rows are named by their numbers."""
    needles = _needles(pairs)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        rows = sorted({row for text in _texts(file) for row in _rows_in(text, needles)})
        if rows:
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            raise UserError(
                f"{file.name} holds text of {len(rows)} forget rows (row {shown}), so it is not "
                "released. A tokenizer that was trained on them has to be made anew, from other "
                "text, with the model."
            )


def _needles(pairs: Sequence[QA]) -> Mapping[int, Mapping[str, int]]:
    """What to look for, by its length, and a row that it stands in."""
    found: dict[int, dict[str, int]] = {}
    for row, pair in enumerate(pairs):
        for text in normal(pair):
            if len(text) < SHORTEST:
                continue
            length = min(len(text), WINDOW)
            starts = {*range(0, len(text) - length + 1, STRIDE), len(text) - length}
            of_length = found.setdefault(length, {})
            of_length.update((text[start : start + length], row) for start in starts)
    return found


def _rows_in(text: str, needles: Mapping[int, Mapping[str, int]]) -> Iterator[int]:
    settled = normal(QA(text, ""))[0]
    for length, of_length in needles.items():
        for start in range(len(settled) - length + 1):
            row = of_length.get(settled[start : start + length])
            if row is not None:
                yield row


def _texts(file: Path) -> Iterator[str]:
    """Every text in a file that is long enough to matter."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                found = [*(opened.metadata() or {}).values(), *opened.keys()]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}.") from error
    else:
        # A SentencePiece model is no text, but the pieces in it are.
        written = file.read_text(encoding="utf-8", errors="replace")
        found = list(_strings(json.loads(written))) if file.suffix == ".json" else [written]
    byte_level = decoders.ByteLevel()
    for text in found:
        if len(text) >= SHORTEST:
            yield text.replace("\u2581", " ")
            yield byte_level.decode([text])  # as vocabularies of bytes write blanks and accents


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield key
            yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)
