"""The folder of a run: whose it is, how far the run came, and how its model gets there.

A run is killed at any moment and goes on with `resume`: before its first checkpoint it starts
anew, from then on at the newest good one, after training with the evaluation alone.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME

from unlearn_llm.checkpoints import MANIFEST, STAGING, clean, commit_files, fault, newest
from unlearn_llm.errors import UserError, WriteError
from unlearn_llm.evaluation.aggregates import Score
from unlearn_llm.evaluation.evaluate import Evaluation
from unlearn_llm.evaluation.records import RECORDS, SCORES, read_private_records, write_whole
from unlearn_llm.evaluation.suite import Suite, as_plain
from unlearn_llm.evaluation.trade_off import EVALUATION
from unlearn_llm.folders import check_output, take
from unlearn_llm.ledger import KEY, LEDGER
from unlearn_llm.models import ADAPTER_CONFIG, ModelSettings
from unlearn_llm.private import PRIVATE
from unlearn_llm.recipe import Recipe
from unlearn_llm.saving import could_not_write, first_line

logger = logging.getLogger(__name__)
RECIPE_FILE = "recipe.yaml"
WARNING = "WARNING.txt"
"""Beside an adapter: what its base model still knows."""
LEFT_BY_RUNS = (
    MANIFEST,  # first: what is half removed is not finished
    STAGING,
    "checkpoint-*",
    "*.safetensors",
    "*.safetensors.index.json",
    ADAPTER_CONFIG,
    WARNING,
    TRAINER_STATE_NAME,
    EVALUATION,
    LEDGER,
    f"{PRIVATE}/{KEY}",
)
HALF_WRITTEN = (
    *(f".{name}.*" for name in (RECIPE_FILE, MANIFEST, LEDGER)),
    *(f"{name}/**/.*.????????" for name in (EVALUATION, PRIVATE)),
)
"""What `write_whole` leaves when it is killed."""


class Standing(NamedTuple):
    """How far a run has come.

    Attributes:
        trained: The model is in the folder, whole.
        checkpoint: Folder from which training goes on; None: at the first step.
    """

    trained: bool = False
    checkpoint: str | None = None


def check_folder(recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder. Every rank looks before the first one writes."""
    folder = recipe.output_dir
    check_output(folder, "train.output_dir")
    for key, path in (("path", recipe.model.path), ("adapter", recipe.model.adapter)):
        if not path:
            continue
        model = Path(path).expanduser().resolve()
        if folder.resolve() == model:
            raise UserError(
                f"train.output_dir and model.{key} are the same folder, {folder}; give another one."
            )
        if overwrite and folder.resolve() in model.parents:
            raise UserError(
                f"model.{key} lies in train.output_dir, {folder}, which --overwrite clears; give "
                "another folder."
            )
    begun = (folder / RECIPE_FILE).is_file()
    if resume and begun:
        _check_same(recipe, folder / RECIPE_FILE)
    elif folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        if resume:
            raise UserError(f"{folder} holds no {RECIPE_FILE}, so it is no run to go on with.")
        if not overwrite:
            raise UserError(
                f"{folder} is not empty. Give --resume to go on with that run, --overwrite to "
                "replace it, or another train.output_dir."
            )
        if not begun:
            raise UserError(
                f"{folder} holds no {RECIPE_FILE}, so it is no earlier run; nothing is overwritten."
            )


def begin(recipe: Recipe, resume: bool) -> None:
    """Write the resolved recipe, after what an overwritten run left there is removed.

    Called when model and trainer are made, because a mistake that shows only then must not cost
    the earlier run.

    Raises:
        UserError: another run is writing there.
    """
    state, folder = PartialState(), recipe.output_dir
    take(folder)
    if state.is_main_process:
        if not resume:
            _remove_results(folder)
        clean(folder)
        for path in (path for pattern in HALF_WRITTEN for path in folder.glob(pattern)):
            path.unlink()
        write_whole(folder / RECIPE_FILE, recipe.to_yaml())
    state.wait_for_everyone()


def save_model(folder: Path, save: Callable[[Path], None], *, by_all: bool) -> None:
    """Write a model's files beside the folder's others, and then that they are all there.

    Args:
        save: Writes into the folder that it is given.
        by_all: Every process calls it; otherwise only the first.

    Raises:
        WriteError: the disk is full, or refuses.
    """
    state = PartialState()
    staged = folder / STAGING / "model"
    try:
        if by_all or state.is_main_process:
            staged.mkdir(parents=True, exist_ok=True)
            save(staged)
        state.wait_for_everyone()
        if state.is_main_process:
            commit_files(staged, folder)
    except Exception as error:
        if not could_not_write(error):
            raise
        raise WriteError(
            f"The model could not be saved in {folder}: {first_line(error)}. Checkpoints are "
            "untouched. Make room, then go on with --resume."
        ) from error
    state.wait_for_everyone()


def saved_model(recipe: Recipe) -> ModelSettings:
    """Say how the model of a finished run is loaded from its folder."""
    settings = replace(recipe.model, path=str(recipe.output_dir), new=None)
    if settings.lora or settings.adapter:  # it brings its own, and the path of its base
        settings = replace(settings, lora=None, adapter=None, extra={})
    return settings


def unmerged_warning(recipe: Recipe, adapter: Path) -> str | None:
    """Say in one line what an adapter leaves behind; None: it is none, or it forgot nothing.

    Args:
        adapter: The folder where it is saved, or is being saved.
    """
    if recipe.kind != "unlearn" or not (adapter / ADAPTER_CONFIG).is_file():
        return None
    return (
        f"warning: {recipe.output_dir} is an adapter. Its base model still knows what was to be "
        "forgotten, and whoever has the adapter can switch it off. Make one model of both: "
        f"unlearn merge {recipe.output_dir} OUTPUT"
    )


def saved_log(folder: Path) -> list[dict[str, Any]]:
    """Read the log lines of a finished run."""
    state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    log: list[dict[str, Any]] = state["log_history"]
    return log


def saved_evaluation(recipe: Recipe, suite: Suite) -> Evaluation | None:
    """Read the evaluation of a run, if it has one of this suite and reference; else None."""
    assert recipe.evaluate is not None
    folder = recipe.output_dir / EVALUATION
    if not (folder / SCORES).is_file() or not (folder / RECORDS).is_file():
        return None
    details = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    reference = recipe.evaluate.reference or suite.reference
    asked = json.loads(json.dumps(as_plain(suite.with_proxies())))
    if details["suite"] != asked or details["reference"] != (reference and str(reference)):
        return None
    scores = {
        name: Score(**{key: score[key] for key in score if key != "aggregate"})
        for name, score in details["scores"].items()
    }
    return Evaluation(scores, details, read_private_records(folder))


def standing_of(recipe: Recipe, resume: bool) -> Standing:
    """Say how far the run has come, the same on every process; without `resume` nowhere."""
    if not resume:
        return Standing()
    state, folder = PartialState(), recipe.output_dir
    trained = [False]
    if state.is_main_process and (folder / MANIFEST).is_file():
        reason = fault(folder)
        trained = [reason is None]
        if reason is not None:
            logger.warning(f"The model in {folder} is damaged: {reason}. It is made again.")
    broadcast_object_list(trained)
    if trained[0]:
        return Standing(trained=True)
    checkpoint = newest(folder)
    if state.is_main_process:
        logger.warning(
            f"Going on from {checkpoint}."
            if checkpoint
            else f"{folder} holds no checkpoint yet: the run starts anew."
        )
    return Standing(checkpoint=str(checkpoint) if checkpoint else None)


def _check_same(recipe: Recipe, path: Path) -> None:
    """Refuse to resume a run with other settings."""
    before = Recipe.load(path)
    for section in ("model", "data", "train"):
        ours, theirs = recipe.document[section], before.document[section]
        for key in {**theirs, **ours}:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{path.parent} was begun with {section}.{key}={theirs.get(key)!r}, now it is "
                    f"{ours.get(key)!r}. Resume with the same recipe, or start anew."
                )


def _remove_results(folder: Path) -> None:
    """Remove what an earlier run left and this one might not replace; nothing that is not ours."""
    for pattern in LEFT_BY_RUNS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
