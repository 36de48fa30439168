"""`unlearn merge`: the adapter of a run, or any other, merged as its run had it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from unlearn_llm import recipe_files
from unlearn_llm.continuing import carry_over
from unlearn_llm.errors import UserError, WriteError
from unlearn_llm.evaluating import model_of_run, run_of
from unlearn_llm.ledger import LEDGER, check_chain
from unlearn_llm.merge import Merged, merge
from unlearn_llm.models import ModelSettings
from unlearn_llm.recipe import Recipe
from unlearn_llm.recipe_check import Place, build, check_section
from unlearn_llm.results import RECIPE_FILE
from unlearn_llm.saving import could_not_write, first_line


def merge_run(folder: Path, output: Path, overrides: Sequence[str] = ()) -> Merged:
    """Merge an adapter into the base that it was trained on, in 4 bits if its run says so.

    The run's recipe goes along, so that the model is measured and attacked as its adapter was, and
    its ledger, so that it can be released and unlearned further.

    Args:
        folder: A run, a checkpoint of one, or any adapter.
        overrides: "model.four_bit={}": for an adapter without a run.

    Raises:
        UserError: see merge.merge.
        WriteError: the disk is full, or refuses.
    """
    if PartialState().num_processes > 1:
        raise UserError("unlearn merge runs in one process; start it without a launcher.")
    document: dict[str, Any] = {"model": {"path": str(folder)}}
    made_by = run_of(folder) / RECIPE_FILE
    files = {}
    if made_by.is_file():
        document["model"] |= model_of_run(Recipe.load(made_by), folder)
        files[RECIPE_FILE] = made_by.read_text(encoding="utf-8")
    recipe_files.override(document, overrides)
    place = Place("merge", [text.partition("=")[0] for text in overrides])
    check_section(ModelSettings, document["model"], "model", place)
    settings: ModelSettings = build(ModelSettings, document["model"])
    has_ledger = (folder / LEDGER).is_file()
    if has_ledger:
        check_chain(folder)
    try:
        merged = merge(settings, output, files)
        if has_ledger:
            carry_over(folder, output)
        return merged
    except Exception as error:
        if not could_not_write(error):
            raise
        raise WriteError(f"{output} could not be written: {first_line(error)}.") from error
