"""Makes the folder: checks the run, copies, compares and searches the files, writes a card."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unlearn_llm.checkpoints import MANIFEST, commit
from unlearn_llm.continuing import totals
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import SCORES, as_json
from unlearn_llm.evaluation.report import read_details
from unlearn_llm.evaluation.trade_off import EVALUATION
from unlearn_llm.ledger import KEY, LEDGER, Entry, check_chain, read_key, row_hashes, rows_asked
from unlearn_llm.models import ModelSettings, is_adapter
from unlearn_llm.private import PRIVATE
from unlearn_llm.recipe import Recipe
from unlearn_llm.recipe_rows import forget_and_retain, pairs_of
from unlearn_llm.release.card import Facts, card
from unlearn_llm.release.change import Change, change, change_by_adapter
from unlearn_llm.release.scan import check_no_forgotten_text, check_no_pickles
from unlearn_llm.results import RECIPE_FILE
from unlearn_llm.rows import QA

WEIGHTS = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
ALLOWED = (*WEIGHTS, *SETTINGS, *TOKENIZER)
CARD = "README.md"
PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""Settings that name a folder of this machine."""


@dataclass(frozen=True)
class Release:
    """What was made.

    Attributes:
        files: Names, in alphabetical order.
        notes: What whoever shares them should know.
    """

    files: list[str]
    notes: list[str] = field(default_factory=list)


def release(
    run: Path,
    output: Path,
    *,
    adapter: bool = False,
    original: Path | None = None,
    forget: Sequence[str] = (),
    unscanned: bool = False,
) -> Release:
    """Copy from a finished run what may be shared, after everything about it is checked.

    Args:
        output: A new folder; it appears whole or not at all.
        adapter: Release an adapter that is not merged into its base model.
        original: The model that was unlearned; None: what the recipe names, if it lies here.
        forget: Sources of rows to look for; none: that of the recipe, which is the last request's.
        unscanned: Do not look for them, because they are gone.

    Raises:
        UserError: the run is unfinished or was changed, nothing was unlearned, a pickle, or text
            that was to be forgotten.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a new folder.")
    entries = check_chain(run)
    recipe = Recipe.load(run / RECIPE_FILE)
    is_unmerged = is_adapter(ModelSettings(path=str(run)))
    if is_unmerged and not adapter:
        raise UserError(
            f"{run} is an adapter: its base model still holds what was to be forgotten. Merge them "
            "with `unlearn merge`, or give --adapter to release it as it is."
        )
    check_no_pickles(run)
    pairs = [] if unscanned else _forget_rows(recipe, forget)
    looked_for = None if unscanned else _recognised(run, entries, pairs)
    details = _scores(run, entries)
    changed, notes = _compare(run, recipe, original, is_unmerged)
    base = recipe.model.path if _is_hub_id(recipe.model.path) else None
    facts = Facts(recipe, entries, changed, looked_for, details, base, is_unmerged)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".release-") as unfinished:
        made = Path(unfinished) / output.name
        made.mkdir()
        _copy(run, made)
        (made / CARD).write_text(card(output.name, facts), encoding="utf-8")
        check_no_pickles(made)
        check_no_forgotten_text(made, pairs)
        commit(made, output)
    files = sorted(path.name for path in output.iterdir())
    return Release(files, [*notes, *_warnings(run, facts)])


def _scores(run: Path, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Read the scores of a run, if it has any; they must be those that the ledger tells of."""
    if not (run / EVALUATION / SCORES).is_file():
        return None
    details = read_details(run / EVALUATION)
    told = [entry["scores"] for entry in entries if entry["event"] == "done"]
    if totals(details["scores"]) not in told:
        raise UserError(
            f"{run / EVALUATION / SCORES}: the scores are not those that {LEDGER} tells of. "
            "Measure the run anew: remove the file, and give --resume to `unlearn train`."
        )
    return details


def _forget_rows(recipe: Recipe, forget: Sequence[str]) -> list[QA]:
    data = recipe.data
    try:
        if not forget:
            return forget_and_retain(data)[0]
        return [pair for source in forget for pair in pairs_of(source, data)]
    except UserError as error:
        raise UserError(
            "The forget rows are needed, to see that the files hold none of their text: "
            f"{error} Give --forget, or --unscanned if they are gone."
        ) from error


def _recognised(run: Path, entries: Sequence[Entry], pairs: Sequence[QA]) -> int:
    """Count the rows of all requests that are among those to look for."""
    key = read_key(run)
    if key is None:
        raise UserError(
            f"{run / PRIVATE / KEY} is missing, so it is not known which rows were asked to be "
            "forgotten. Restore it, or give --unscanned."
        )
    return len(rows_asked(entries) & set(row_hashes(key, pairs)))


def _compare(
    run: Path, recipe: Recipe, original: Path | None, is_unmerged: bool
) -> tuple[Change | None, list[str]]:
    """Say how far the weights went; None, and why, where the original is not at hand."""
    before = original or Path(recipe.model.path or "").expanduser()
    if original is not None and not original.is_dir():
        raise UserError(f"--original: there is no folder {original}.")
    if is_unmerged and not is_adapter(ModelSettings(path=str(before))):
        found = change_by_adapter(run)
    elif before.is_dir():
        found = change(before, run)
    else:
        return None, [f"Not compared with the original, {before}: give its folder as --original."]
    if not found.changed:
        raise UserError(f"{run} holds the weights of {before}: nothing was unlearned.")
    return found, []


def _copy(run: Path, made: Path) -> None:
    """Copy the files that the run saved and that are on the list."""
    saved = json.loads((run / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in saved:
        if any(fnmatch(name, pattern) for pattern in ALLOWED):
            shutil.copyfile(run / name, made / name)
            if name.endswith("config.json"):
                _leave_out_places(made / name)


def _leave_out_places(file: Path) -> None:
    """Keep of a folder its own name: where it lay is nobody's business."""
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "auto_map" in settings:
        raise UserError(
            f"{file.name} names Python code (auto_map), which is not released. Use a model whose "
            "architecture transformers has."
        )
    local = {
        name: Path(settings[name]).name
        for name in PLACES
        if isinstance(settings.get(name), str) and not _is_hub_id(settings[name])
    }
    if any(settings[name] != short for name, short in local.items()):
        file.write_text(as_json({**settings, **local}, indent=2) + "\n", encoding="utf-8")


def _warnings(run: Path, facts: Facts) -> list[str]:
    checkpoints = len(list(run.glob("checkpoint-*")))
    before = str(facts.recipe.model.path)
    kept = [before, *([f"{checkpoints} checkpoints in {run}"] * bool(checkpoints))]
    notes = [
        f"The model before is still there: {', '.join(kept)}, and wherever copies of it lie. Do "
        "not share both: the pair tells what was forgotten."
    ]
    if facts.adapter:
        notes.append("The base model still holds what was to be forgotten; the adapter hides it.")
    if facts.looked_for is None:
        notes.append("Nothing looked for forgotten text in these files.")
    elif facts.looked_for < facts.rows:
        notes.append(
            f"Looked for the text of {facts.looked_for} of {facts.rows} rows: give those of all "
            "requests with --forget, which may stand more than once."
        )
    return notes


def _is_hub_id(path: str | None) -> bool:
    found = path or ""
    return (
        found.count("/") == 1 and not found.startswith((".", "/", "~")) and not Path(found).exists()
    )
