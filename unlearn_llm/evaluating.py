"""`unlearn eval`: models, or records of earlier evaluations, side by side."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from unlearn_llm import recipe_files
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import recompute, scores_json
from unlearn_llm.evaluation.lm_eval import require_lm_eval
from unlearn_llm.evaluation.lm_eval_export import export_tasks
from unlearn_llm.evaluation.records import SCORES, read_records
from unlearn_llm.evaluation.report import read_details
from unlearn_llm.evaluation.strict import validated
from unlearn_llm.evaluation.suite import Suite, as_plain
from unlearn_llm.folders import check_output
from unlearn_llm.merge import NOTE as MERGED
from unlearn_llm.model_files import check_model
from unlearn_llm.models import ADAPTER_CONFIG, ModelSettings, load_tokenizer
from unlearn_llm.pipeline import run_evaluate
from unlearn_llm.recipe import DataSettings, Recipe
from unlearn_llm.recipe_check import Place, build, check_section
from unlearn_llm.results import RECIPE_FILE
from unlearn_llm.safe_text import folder_name
from unlearn_llm.shared_base import SharedBase, base_of

Details = dict[str, Any]
DEFAULT_SUITE = "tofu"
CHECKPOINT = re.compile(r"checkpoint-\d+")
FROM_RUN = ("template", "system", "max_length", "truncate", "folder", "refusals", "seed")
"""Settings of the data that an evaluation takes over from the run that made the model."""


def evaluate_models(
    models: Sequence[str],
    suite: str | None,
    overrides: Sequence[str],
    reference: Path | None,
    output: Path,
    overwrite: bool = False,
    show_forget_text: bool = False,
) -> dict[str, Details]:
    """Evaluate models one after the other; the details of each by its name.

    A model folder of ours has a recipe.yaml: its template, files and kind of objective hold, too,
    unless overridden. A checkpoint of a run takes the run's. Adapters of one base share it in
    memory.

    Raises:
        UserError: before the first weights are loaded, if the mistake is in what was given.
    """
    suite = suite or DEFAULT_SUITE
    names = list({str(Path(name)): name for name in models}.values())
    prepared = {name: _prepare(name, suite, overrides) for name in names}
    for model, _, _ in prepared.values():
        check_model(model, load_tokenizer(model))
    if reference is not None:
        read_records(reference)
    folders = {name: output / suite_name(suite) / folder_name(str(Path(name))) for name in names}
    for folder in folders.values():
        check_output(folder, "--output")
        if (folder / SCORES).is_file() and not overwrite:
            raise UserError(
                f"{folder} holds the scores of an earlier evaluation. Give --overwrite to replace "
                "them, or another --output."
            )
    bases = {name: base_of(model) for name, (model, _, _) in prepared.items()}
    shared = SharedBase()
    found = {}
    for name in sorted(names, key=lambda name: list(bases.values()).index(bases[name])):
        model, data, loaded = prepared[name]
        evaluation = run_evaluate(
            model,
            loaded,
            data,
            folders[name],
            reference=reference,
            show_forget_text=show_forget_text,
            load=shared.load,
        )
        found[name] = evaluation.details
    return {name: found[name] for name in names}


def recompute_records(
    records: Sequence[Path], suite: str | None, overrides: Sequence[str], reference: Path | None
) -> dict[str, Details]:
    """Make the scores anew from records, without models.

    Without a suite, it is the one in the scores.json beside the records, as it was resolved then.
    """
    changes: Details = {}
    recipe_files.override(changes, overrides)
    found = {}
    for path in records:
        beside = (path if path.is_dir() else path.parent) / SCORES
        details = read_details(beside) if beside.is_file() else {}
        if suite is not None or "suite" not in details:
            loaded = Suite.load(suite or DEFAULT_SUITE, **changes)
        else:
            loaded = validated(Suite, {**details["suite"], **changes}, str(beside))
        reasons = details.get("not_measured")
        scores = recompute(path, loaded, reference_records=reference, not_measured=reasons)
        made = scores_json(loaded.with_proxies(), scores)
        found[str(path)] = {"suite": as_plain(loaded), **made}
    return found


def export_suite(name: str, suite: str, overrides: Sequence[str], folder: Path) -> list[str]:
    """Write a suite as tasks of lm-eval, for models with a model's tokenizer and template."""
    model, data, loaded = _prepare(name, suite, overrides)
    encoder = Encoder(
        load_tokenizer(model), data.template, data.max_length, data.truncate, data.system
    )
    return export_tasks(loaded, encoder, folder)


def suite_name(suite: str) -> str:
    """Name a suite by its file."""
    return Path(suite).name.removesuffix(".yaml").removesuffix(".yml")


def _prepare(
    name: str, suite: str, overrides: Sequence[str]
) -> tuple[ModelSettings, DataSettings, Suite]:
    """Settle model, data and suite of one evaluation."""
    document: Details = {"model": {"path": name}, "data": {}}
    of_suite: Details = {}
    folder = Path(name).expanduser()
    made_by = run_of(folder) / RECIPE_FILE
    if made_by.is_file():
        run = Recipe.load(made_by)
        document["model"] |= model_of_run(run, folder)
        document["data"] = {
            k: run.document["data"][k] for k in FROM_RUN if k in run.document["data"]
        }
        of_suite = run.suite_settings(suite)
        if "folder" not in of_suite:  # or the suite reads other data than the run
            document["data"].pop("folder", None)
        if run.evaluate is not None and run.evaluate.suite == suite:
            # Measured as the run measured itself, unless told otherwise.
            of_suite |= {"reference": run.evaluate.reference, **run.evaluate.overrides}
    recipe_files.override(document, [text for text in overrides if _is_section(text)])
    recipe_files.override(of_suite, [text for text in overrides if not _is_section(text)])
    place = Place("eval", [text.partition("=")[0] for text in overrides])
    check_section(ModelSettings, document["model"], "model", place)
    check_section(DataSettings, document["data"], "data", place)
    model, data = build(ModelSettings, document["model"]), build(DataSettings, document["data"])
    if data.folder is not None:
        of_suite.setdefault("folder", data.folder)
    loaded = Suite.load(suite, **of_suite)
    require_lm_eval(loaded)
    load_tokenizer(model)  # is it there?
    return model, data, loaded


def run_of(folder: Path) -> Path:
    """Give the folder of the run: of a checkpoint-N the one it lies in, else the folder itself."""
    return folder.parent if CHECKPOINT.fullmatch(folder.name) else folder


def model_of_run(run: Recipe, folder: Path) -> Details:
    """Say how a run's own evaluation had its model, where the model's folder does not.

    A checkpoint holds the float32 weights that trained, and may hold no tokenizer. A merged model
    says all of itself.
    """
    if (folder / MERGED).is_file():
        return {}
    found = four_bit_of_run(run, folder)
    of_run = run_of(folder)
    config = of_run / "config.json"
    if run.model.dtype != "auto":
        found["dtype"] = run.model.dtype
    elif of_run != folder and config.is_file():
        found["dtype"] = json.loads(config.read_text(encoding="utf-8")).get("dtype") or "auto"
    if not (folder / TOKENIZER_CONFIG_FILE).is_file():
        if (of_run / TOKENIZER_CONFIG_FILE).is_file():
            found["tokenizer"] = str(of_run)
        else:
            found["tokenizer"] = run.model.tokenizer or run.model.path
    return found


def four_bit_of_run(run: Recipe, folder: Path) -> Details:
    """Say in what the base of a run's adapter was held; a merged model is held as it is."""
    if run.model.four_bit is None or not (folder / ADAPTER_CONFIG).is_file():
        return {}
    return {"four_bit": run.document["model"]["four_bit"]}


def _is_section(text: str) -> bool:
    return text.startswith(("model.", "data."))
