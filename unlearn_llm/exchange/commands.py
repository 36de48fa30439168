"""`unlearn export` and `unlearn import`: folders in, folders out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import (
    SCORES,
    Record,
    as_json,
    read_private_records,
    write_json,
    write_records,
)
from unlearn_llm.evaluation.report import read_details
from unlearn_llm.exchange.losses import with_likelihoods
from unlearn_llm.exchange.model_index import model_index
from unlearn_llm.exchange.tofu_csv import tofu_csv
from unlearn_llm.leaderboard.runs import EVALUATION, RECIPE, scheme
from unlearn_llm.recipe_files import read_document
from unlearn_llm.registry import did_you_mean

EXPORTS = ("tofu-csv", "open-unlearning", "model-index")
IMPORTS = ("open-unlearning",)


def export_folder(
    folder: Path,
    style: str,
    reference: Path | None = None,
    submitted_by: str = "",
    show_forget_text: bool = False,
) -> str:
    """Write an evaluation in another project's format.

    Args:
        folder: Of a run (with evaluation/ in it) or of an evaluation.
        style: One of EXPORTS.
        reference: Records of a gold model; None: those that the evaluation names.
        show_forget_text: Where the format has a place for them, write questions, answers and
            generations, too.

    Raises:
        UserError: an unknown format, no evaluation, or one that lacks what the format needs.
    """
    _check(style, EXPORTS)
    place = folder if (folder / SCORES).is_file() else folder / EVALUATION
    details = read_details(place)
    recipe = read_document(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    name = _name(recipe, details, folder)
    if style == "model-index":
        path = str((recipe.get("model") or {}).get("path") or "")
        return model_index(details, name, base_model=path if _is_hub_id(path) else None)
    records = with_likelihoods(read_private_records(place))
    compared = _reference(reference or details.get("reference"))
    if style == "tofu-csv":
        return tofu_csv(records, compared, method=name, submitted_by=submitted_by)
    from unlearn_llm.exchange import open_unlearning  # imports transformers

    log = open_unlearning.from_records(records, compared, show_forget_text)
    return as_json(log, indent=4) + "\n"


def import_file(
    file: Path, style: str, output: Path, reference: Path | None = None, overwrite: bool = False
) -> Mapping[str, Any]:
    """Read another project's evaluation into records.jsonl and scores.json.

    Returns:
        The scores, recomputed from the rows of the file.

    Raises:
        UserError: an unknown format, a file that is none, or a folder with an evaluation in it.
    """
    _check(style, IMPORTS)
    if (output / SCORES).is_file() and not overwrite:
        raise UserError(f"{output} holds an evaluation. Give --overwrite, or another --output.")
    from unlearn_llm.exchange import open_unlearning

    log = open_unlearning.read_log(file)
    records = open_unlearning.to_records(log)
    details = open_unlearning.details_of(log, file, records, _reference(reference))
    write_records(output, records)
    write_json(output / SCORES, details)
    scores: Mapping[str, Any] = details["scores"]
    return scores


def _check(style: str, known: Sequence[str]) -> None:
    if style not in known:
        near = did_you_mean(style, known)
        raise UserError(f"--format: expected {' or '.join(known)}, got {style!r}.{near}")


def _reference(path: str | Path | None) -> list[Record] | None:
    """Read the records of a gold model, ours or open-unlearning's."""
    if path is None:
        return None
    path = Path(path).expanduser()
    if path.suffix == ".json":
        from unlearn_llm.exchange import open_unlearning

        return open_unlearning.to_records(open_unlearning.read_log(path))
    return with_likelihoods(read_private_records(path))


def _name(recipe: Mapping[str, Any], details: Mapping[str, Any], folder: Path) -> str:
    train = recipe.get("train")
    if recipe.get("kind", "finetune") == "unlearn" and train:
        return f"{train.get('objective')} {scheme(train)}"
    return str(details.get("model", {}).get("name") or folder.name)


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
