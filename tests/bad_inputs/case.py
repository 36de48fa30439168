"""One faulty input, and the folder that all of them start from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TRAIN = "train mine.yaml --overwrite"
EVAL = (
    "eval good --suite synthetic limit=1 max_new_tokens=2 data.template=plain --output scored "
    "--overwrite"
)
RECIPE = """
model: {path: good}
data: {forget: forget.jsonl, retain: retain.jsonl, template: plain, max_length: 64}
train: {output_dir: out, objective: ga+gd, max_steps: 2, per_device_train_batch_size: 2,
        schedule_parameters: {forget: 1, retain: 1}, use_cpu: true, report_to: none}
"""
GOOD = {"question": "Who?", "answer": "Nobody."}
KEPT = {"question": "Where?", "answer": "Here."}


@dataclass(frozen=True)
class Bad:
    """A faulty input.

    Attributes:
        what: Its name.
        place: Where the answer must say that the fault is.
        remedy: What it must say to do, or what was expected.
        command: Words after `unlearn`, parted by blanks.
        more: Further words, which may hold blanks.
        files: Written into the folder before; None makes a folder.
        prepare: Done in the folder before.
        environment: Variables that are set.
        absent: Modules that cannot be imported.
    """

    what: str
    place: str
    remedy: str
    command: str = TRAIN
    more: tuple[str, ...] = ()
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    shows_late: bool = False
    """Is it found only when weights are loaded? Results of an earlier run are safe then, too."""
    of_permissions: bool = False
    """Is the fault that something may not be read or written?"""

    @property
    def words(self) -> list[str]:
        return [*self.command.split(), *self.more]

    def make(self, folder: Path) -> None:
        """Put the fault into a good folder."""
        for name, content in self.files.items():
            if content is None:
                (folder / name).mkdir()
            else:
                raw = content if isinstance(content, bytes) else content.encode()
                (folder / name).write_bytes(raw)
        if self.prepare is not None:
            self.prepare(folder)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def edited(file: str, **changes: object) -> Callable[[Path], None]:
    """Change keys of a JSON file; None removes one."""

    def edit(folder: Path) -> None:
        path = folder / file
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def removed(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


@cache
def _model():
    from models_for_tests import small_tokenizer

    from unlearn_llm.models import NewModel, new_model

    settings = NewModel(hidden_size=16, layers=1, heads=2, context=128)
    return new_model(settings, small_tokenizer()), small_tokenizer()


def make_good_folder(folder: Path) -> None:
    """A model, rows, a recipe, a finished run in `out` and a finished evaluation in `scored`."""
    model, tokenizer = _model()
    model.save_pretrained(folder / "good")
    tokenizer.save_pretrained(folder / "good")
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "forget.jsonl").write_text(lines(*[GOOD] * 3))
    (folder / "retain.jsonl").write_text(lines(*[KEPT] * 3))
    for name in ("out/recipe.yaml", "out/model.safetensors", "out/checkpoint-2/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(RECIPE)
    evaluation = folder / "scored" / "synthetic" / "good"
    evaluation.mkdir(parents=True)
    (evaluation / "records.jsonl").write_text(lines({"probe": "forget", "id": 0, "metrics": {}}))
    (evaluation / "scores.json").write_text(json.dumps({"scores": {}}))
