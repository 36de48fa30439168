"""Folders that are whole or not there: checkpoints, and the files of a finished model.

A checkpoint is written into a hidden folder, forced onto the disk, listed in a manifest (bytes and
SHA-256 of every file) and renamed. What a killed save leaves therefore never has a checkpoint's
name, and what later goes wrong with the files shows before they are loaded. The sums are made of
files that were just written, from memory: 1 to 2 GB/s, less time than writing them.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from unlearn_llm.evaluation.records import write_json

logger = logging.getLogger(__name__)
MANIFEST = "unlearn_manifest.json"
STAGING = ".unfinished"
"""Folder inside a results folder; what stands in it was left by a killed save."""
NAME = re.compile(r"checkpoint-(\d+)")


def commit(staged: Path, final: Path) -> None:
    """Make a folder in `STAGING` a checkpoint; an older one of that name goes."""
    _write_manifest(staged, list(_files(staged)))
    if final.exists():
        discard(final)
    staged.rename(final)
    _sync(final.parent)
    _sync(staged.parent)


def commit_files(staged: Path, folder: Path) -> None:
    """Move files out of `STAGING` into the folder above, one by one; the manifest comes last."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = list(_files(staged))
    for file in files:
        target = folder / file.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    _write_manifest(folder, [folder / file.relative_to(staged) for file in files])
    clean(folder)


def fault(folder: Path) -> str | None:
    """Say what is wrong with a folder that has a manifest; None: every file is as it was saved."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its save was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, saved in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != saved["bytes"]:
            return f"{name} has {file.stat().st_size} bytes of {saved['bytes']}"
        if _sha256(file) != saved["sha256"]:
            return f"{name} is not what was saved (SHA-256)"
    return None


def newest(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files are as they were saved, the same on every process.

    Newer ones that are damaged are named, with what is wrong.
    """
    found: list[Path | None] = [None]
    if PartialState().is_main_process:
        for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
            reason = fault(checkpoint)
            if reason is None:
                found = [checkpoint]
                break
            logger.warning(f"{checkpoint} is damaged: {reason}. The one before it is looked at.")
    broadcast_object_list(found)
    return found[0]


def rotate(newest_one: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside the newest, down to a number of them.

    Args:
        limit: None or 0: all are kept.
        best: A checkpoint that is kept, too.
    """
    kept = {newest_one} | ({Path(best)} if best else set())
    others = [one for one in _checkpoints(newest_one.parent) if one not in kept]
    # By age and not by step: after a return to an older checkpoint those of later steps are older.
    others.sort(key=lambda one: (_written(one), _step(one)))
    spare = len(others) + len(kept) - max(limit, len(kept)) if limit else 0
    for old in others[: max(0, spare)]:
        discard(old)


def discard(folder: Path) -> None:
    """Remove a folder in such a way that a kill leaves nothing with its name."""
    hidden = folder.parent / STAGING / f"discarded-{folder.name}"
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Remove what killed saves left."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [one for one in folder.iterdir() if NAME.fullmatch(one.name) and one.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _written(checkpoint: Path) -> int:
    manifest = checkpoint / MANIFEST
    return manifest.stat().st_mtime_ns if manifest.is_file() else 0


def _files(folder: Path) -> Iterator[Path]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return (file for file in files if file.name != MANIFEST)


def _write_manifest(folder: Path, files: list[Path]) -> None:
    """Force files onto the disk and list them."""
    listed = {}
    for file in files:
        _sync(file)
        name = file.relative_to(folder).as_posix()
        listed[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    for inner in {file.parent for file in files}:
        _sync(inner)
    write_json(folder / MANIFEST, {"files": listed})
    _sync(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
