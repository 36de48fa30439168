"""Runs the commands of leaks.py, each in a process of its own, and looks for words after each."""

import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from leaks_commands import COMMANDS, RECIPES, Command
from leaks_data import STEM, make
from leaks_scan import Scanner
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer

from unlearn_llm import attacking, cli, evaluating, pipeline, saving  # noqa: F401  before the forks
from unlearn_llm.evaluation import journal, records
from unlearn_llm.models import new_tokenizer
from unlearn_llm.private import PRIVATE

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}
WEIGHTS = "model.safetensors"
OF_CHECKPOINTS = ("checkpoint-", ".unfinished")
MOST_BYTES = 200_000
"""What a disk lets into one file when it is full: less than the weights' size."""


class Seen(NamedTuple):
    """By this a file is known to be the same as before."""

    changed: int
    size: int


def run_all(
    folder: Path, only: Sequence[str] | None, secret: str, homes: Sequence[str], quiet: bool
) -> dict[str, Any]:
    """Run commands, and look through what they left after each."""
    tqdm.set_lock(threading.RLock())  # the usual one is shared by forks
    planted = make(folder / "data")
    for name, recipe in RECIPES.items():
        text = yaml.safe_dump(recipe).replace("DATA", str(folder / "data"))
        (folder / "data" / name).write_text(text, encoding="utf-8")
    new_tokenizer(planted.all, 900).save_pretrained(folder / "data" / "tokenizer")
    for name in ("cwd", "logs"):
        (folder / name).mkdir()
    looker = Looker(folder, [*homes, "cwd", "logs"], planted.all, secret)
    runs, hits = [], []
    for command in tqdm(chosen(only), desc="commands", disable=quiet):
        code = run(command, folder)
        if command.name == "target":
            looker.know(folder / "cwd" / "target")
        if command.of_texts is not None:
            looker.of_texts.append(folder / "cwd" / command.of_texts)
        found, files = looker.look()
        hits += [{"command": command.name, **hit} for hit in found]
        runs.append(
            {
                "name": command.name,
                "code": code,
                "expected": list(command.codes),
                "as_expected": code in command.codes,
                "files": files,
            }
        )
    return {
        "canaries": len(planted.all),
        "commands": len(runs),
        "hits": hits,
        "in_private": looker.in_private(),
        "runs": runs,
    }


def chosen(only: Sequence[str] | None) -> list[Command]:
    """Give the commands that are named, after those whose results they need."""
    if only is None:
        return [command for command in COMMANDS.values() if not command.shows]
    wanted: dict[str, None] = {}

    def add(name: str) -> None:
        for other in COMMANDS[name].needs:
            add(other)
        wanted[name] = None

    for name in only:
        add(name)
    return [COMMANDS[name] for name in wanted]


def run(command: Command, folder: Path) -> int:
    """Run one command; give its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(in_child(command, folder))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def in_child(command: Command, folder: Path) -> int:
    """Be the command line: arguments, working folder, streams, and what goes wrong."""
    for stream, name in ((1, "out"), (2, "err")):
        log = folder / "logs" / f"{command.name}.{name}"
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    os.chdir(folder / "cwd")
    data = str(folder / "data")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    sys.argv = ["unlearn", *(word.replace("DATA", data) for word in command.words)]
    if command.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        by = [*launcher, str(command.ranks), "-m", "unlearn_llm", *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, *by])
    if command.fault is not None:
        FAULTS[command.fault]()
    code: int | str | None = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


class Looker:
    """Looks through the files that changed since it looked last."""

    def __init__(self, folder: Path, roots: Sequence[str], words: list[str], secret: str) -> None:
        self._folder = folder
        self._roots = [folder / root for root in roots]
        self._words = words
        self._scanner = Scanner(words, STEM)
        self._secret = Scanner([secret])
        self._seen: dict[Path, Seen] = {}
        self._original: dict[str, Any] | None = None
        self.of_texts: list[Path] = []
        """Files and folders that hold rows by purpose: nobody else may read them."""

    def know(self, model: Path) -> None:
        """Look for the words' tokens from now on, and for the weights of the model."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        ways = {}
        for word in self._words:
            coded = [
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (word, f" {word}")
            ]
            ways[word] = [(ids, tokenizer.convert_ids_to_tokens(ids)) for ids in coded]
        self._scanner = Scanner(self._words, STEM, ways)
        self._seen.clear()  # once more through all files
        self._original = load_file(model / WEIGHTS)
        self._model = model

    def look(self) -> tuple[list[dict[str, str]], int]:
        """Give what was found, and how many files were looked through."""
        found, files = [], 0
        for path in self._changed():
            shown = path.relative_to(self._folder)
            if PRIVATE in shown.parts or {path, *path.parents} & {*self.of_texts}:
                found += _open_to_others(path, shown)
                continue
            if path.is_dir():
                continue
            files += 1
            hits = [*self._scanner.file(path), *self._secret.file(path), *self._scanner.name(shown)]
            found += [{"what": h.word, "how": h.encoding, "file": str(shown)} for h in hits]
            if path.suffix in PICKLES and not _of_checkpoint(shown):
                found.append({"what": "a pickle", "how": path.suffix, "file": str(shown)})
            if path.suffix == ".safetensors" and self._is_original(path):
                found.append({"what": "the original", "how": "weights", "file": str(shown)})
        return found, files

    def in_private(self) -> int:
        """Count the words that stand in private/: none there would mean that none was used."""
        texts = [
            path.read_bytes() for root in self._roots for path in root.rglob(f"{PRIVATE}/*.jsonl")
        ]
        return len({word for text in texts for word, _ in self._scanner.content(text)})

    def _changed(self) -> list[Path]:
        changed = []
        for path in sorted(path for root in self._roots for path in root.rglob("*")):
            if path.is_symlink():
                continue
            status = path.stat()
            now = Seen(status.st_mtime_ns, status.st_size)
            if self._seen.get(path) != now:
                self._seen[path] = now
                changed.append(path)
        return changed

    def _is_original(self, path: Path) -> bool:
        """Are these the weights that were to be changed, elsewhere than where they were?"""
        if self._original is None or self._model in path.parents:
            return False
        weights = load_file(path)
        return all(
            name in weights and torch.equal(weights[name], tensor)
            for name, tensor in self._original.items()
        )


def _open_to_others(path: Path, shown: Path) -> list[dict[str, str]]:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077 == 0:
        return []
    return [{"what": "open to others", "how": f"{mode:o}", "file": str(shown)}]


def _of_checkpoint(shown: Path) -> bool:
    return any(part.startswith(OF_CHECKPOINTS) for part in shown.parts)


def _before(module: Any, name: str, action: Callable[[], None], nth: int = 1) -> None:
    """Let something happen before the nth call of a function, as it is called from a module."""
    original, calls = getattr(module, name), iter(range(1, sys.maxsize))

    def acting(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == nth:
            action()
        return original(*arguments, **keywords)

    setattr(module, name, acting)


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, resource.RLIM_INFINITY))


FAULTS: dict[str, Callable[[], None]] = {
    "killed while saving": lambda: _before(saving, "commit", _signal(signal.SIGKILL), nth=2),
    "killed while evaluating": lambda: _before(
        journal.Journal, "add", _signal(signal.SIGKILL), nth=2
    ),
    "killed while writing": lambda: _before(records, "without_texts", _signal(signal.SIGKILL)),
    "told to go": lambda: _before(saving, "commit", _signal(signal.SIGTERM)),
    "interrupted": lambda: _before(saving, "commit", _signal(signal.SIGINT)),
    "disk full": _full_disk,
}
