"""The ledger of a run, requests.jsonl: what was asked to be forgotten, and what came of it.

Two entries per request, `asked` and `done`, those of earlier requests first. Rows stand in it as
keyed hashes (HMAC-SHA256). A plain hash of "Jane Doe, 12 Elm St" can be found by whoever guesses
the text; with the key it cannot, so the ledger may be shown where the key is not. The price is that
earlier rows are recognised only by whoever has `private/requests.key`, which goes from run to run.

Every entry holds the hash of the one before, so that none can be changed or taken out unseen, and
`done` holds that of the weights, so that the model beside the ledger is the one that it tells of.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unlearn_llm.checkpoints import MANIFEST, fault
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import as_json, write_whole
from unlearn_llm.private import PRIVATE, private_folder
from unlearn_llm.rows import QA, normal

LEDGER = "requests.jsonl"
KEY = "requests.key"
KEY_BYTES = 32
WEIGHTS = ".safetensors"
Entry = dict[str, Any]


def new_entry(event: str, request: int, **content: Any) -> Entry:
    """Make an entry of this moment (UTC).

    Args:
        event: "asked" or "done".
        request: 1 for the first of a chain.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"event": event, "request": request, "time": time, **content}


def read_ledger(folder: Path) -> list[Entry]:
    """Read the entries of a run's ledger, oldest first; none if it has no ledger.

    Raises:
        UserError: a line is no entry, or not the one that the next line was written after.
    """
    path = folder / LEDGER
    if not path.is_file():
        return []
    entries: list[Entry] = []
    before = ""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(filter(None, lines), start=1):
        try:
            entry = json.loads(line)
            known = {"asked": ("rows", "parent"), "done": ("weights", "scores")}[entry["event"]]
            sound = entry["previous"] == before and all(name in entry for name in known)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not an entry of a ledger.") from error
        if not sound:
            raise UserError(
                f"{path}, line {number}: an entry before it was changed or taken out. Restore the "
                "file: what was forgotten is not known without it."
            )
        entries.append(entry)
        before = _hash(line)
    return entries


def write_ledger(folder: Path, entries: Sequence[Entry]) -> None:
    """Write all entries, linked; a killed run leaves the old file or the new one."""
    lines: list[str] = []
    for entry in entries:
        before = _hash(lines[-1]) if lines else ""
        lines.append(as_json({**entry, "previous": before}))
    write_whole(folder / LEDGER, "".join(line + "\n" for line in lines))


def read_key(folder: Path) -> bytes | None:
    """Read the key of a run's row hashes; None if it has none.

    Raises:
        UserError: the file cannot be read, or does not hold a key.
    """
    path = folder / PRIVATE / KEY
    if not path.is_file():
        return None
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Ask its owner.") from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{path} does not hold {KEY_BYTES} bytes in hexadecimal. Restore it.")
    return key


def write_key(folder: Path, key: bytes) -> None:
    """Write the key where only its owner reads it."""
    write_whole(private_folder(folder) / KEY, key.hex() + "\n", private=True)


def new_key() -> bytes:
    """Draw a key."""
    return secrets.token_bytes(KEY_BYTES)


def row_hashes(key: bytes, pairs: Iterable[QA]) -> list[str]:
    """Hash question and answer as `rows.check_disjoint` compares them: 32 hexadecimal digits."""
    contents = (json.dumps(normal(pair)).encode() for pair in pairs)
    return [hmac.new(key, content, hashlib.sha256).hexdigest()[:32] for content in contents]


def rows_asked(entries: Iterable[Entry]) -> set[str]:
    """Give the hashes of all rows that were asked to be forgotten."""
    return {row for entry in entries if entry["event"] == "asked" for row in entry["rows"]}


def weights_hash(folder: Path) -> str:
    """Hash the weights of a finished run by the sums that its manifest lists."""
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    named = {name: file["sha256"] for name, file in listed.items() if name.endswith(WEIGHTS)}
    return _hash(json.dumps(sorted(named.items())))


def check_chain(folder: Path) -> list[Entry]:
    """Give the ledger of a finished run, after its files and all requests before it are checked.

    Raises:
        UserError: the run is not finished, has no ledger, or its weights are not those that the
            ledger tells of.
    """
    entries = read_ledger(folder)
    if not entries:
        raise UserError(
            f"{folder} holds no {LEDGER}, so what it forgot is not known. Give the folder of a run "
            "of `unlearn train`; a run of an older version has to be made again."
        )
    reason = fault(folder)
    if reason is None and entries[-1]["event"] == "asked":
        reason = "its ledger ends before the request was done"
    if reason is not None:
        raise UserError(f"{folder} is no finished run: {reason}. Finish it with --resume.")
    weights = ""
    for entry in entries:
        if entry["event"] == "done":
            weights = entry["weights"]
        elif entry["parent"]["weights"] != weights and weights:
            raise UserError(
                f"{folder / LEDGER}: request {entry['request']} began with other weights than the "
                "request before it ended with."
            )
    if weights != weights_hash(folder):
        raise UserError(f"{folder}: the weights are not those that {LEDGER} tells of.")
    return entries


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
