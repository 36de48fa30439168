"""Runs, from a recipe to a folder: what the command line, the demo and the benchmarks call.

Everything cheap comes first (names, files, rows, tokens, folders), so that a mistake shows in
seconds; weights are loaded last.

A results folder holds the model and the tokenizer, recipe.yaml, trainer_state.json, checkpoints,
evaluation/ with records.jsonl and scores.json (texts are in evaluation/private/ only), and of an
unlearning run requests.jsonl (ledger.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from unlearn_llm.alternates import alternate_answers, write_pairs
from unlearn_llm.config import UnlearnConfig
from unlearn_llm.continuing import Request
from unlearn_llm.dataset import read_refusals
from unlearn_llm.encode import Encoder, check_context
from unlearn_llm.engines import check_engine, check_kind
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.during import DuringTraining
from unlearn_llm.evaluation.evaluate import Evaluation, evaluate
from unlearn_llm.evaluation.records import read_records
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.evaluation.trade_off import EVALUATION
from unlearn_llm.finetune import finetune
from unlearn_llm.folders import alone, check_output, take
from unlearn_llm.launch import check_launch, check_packages
from unlearn_llm.model_files import check_model
from unlearn_llm.models import (
    ModelSettings,
    context_length,
    load_model,
    load_tokenizer,
    new_model,
    new_tokenizer,
)
from unlearn_llm.preemption import listening
from unlearn_llm.recipe import DataSettings, Recipe
from unlearn_llm.recipe_rows import forget_and_retain, pairs_of, texts_of
from unlearn_llm.results import (
    WARNING,
    begin,
    check_folder,
    save_model,
    saved_evaluation,
    saved_log,
    saved_model,
    standing_of,
    unmerged_warning,
)
from unlearn_llm.rows import QA, check_disjoint
from unlearn_llm.saving import SavingTrainer
from unlearn_llm.trainer import UnlearnTrainer

logger = logging.get_logger(__name__)


class Run(NamedTuple):
    """What a training run left.

    Attributes:
        folder: Where the results are.
        log: The Trainer's log lines, in order.
        evaluation: None if the recipe asks for none.
        warning: What a user must know of the result, in one line.
    """

    folder: Path
    log: list[dict[str, Any]]
    evaluation: Evaluation | None
    warning: str | None = None


@listening()
@alone()
def run_finetune(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Fine-tune a model, or train a new one, as a recipe of kind finetune says.

    Raises:
        UserError: recipe, data, model or folder cannot be used; before weights are loaded.
    """
    if recipe.kind != "finetune":
        raise UserError(f"{recipe.name} is a recipe to unlearn: use `unlearn train`.")
    check_launch()
    check_folder(recipe, resume, overwrite)
    suite = _suite(recipe)
    data = recipe.data
    pairs = [pair for source in data.train for pair in pairs_of(source, data)]
    if recipe.model.new is not None:
        texts = [part for s in data.tokenizer_rows or data.train for part in texts_of(s, data)]
        tokenizer: Any = new_tokenizer(texts, recipe.model.new.vocabulary)
    else:
        tokenizer = load_tokenizer(recipe.model)
        check_model(recipe.model, tokenizer)
    encoder = _encoder(tokenizer, data)
    _check_encodes(encoder, pairs, "the training rows", recipe.model)
    args = recipe.arguments()
    check_packages(args)
    check_kind(args, four_bit=recipe.model.four_bit is not None)
    standing = standing_of(recipe, resume)
    if standing.trained:
        return _go_on(recipe, suite, encoder)
    args.resume_from_checkpoint = standing.checkpoint
    if recipe.model.new is not None:
        model = new_model(recipe.model.new, tokenizer, seed=args.seed)
    else:
        set_seed(args.seed)  # a fresh adapter is random
        model = load_model(recipe.model)
    kept = _Kept(model)
    begin(recipe, resume)
    trainer = finetune(model, tokenizer, pairs, encoder, args)
    return _finish(trainer, recipe, kept, suite, encoder)


@listening()
@alone()
def run_train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Unlearn as a recipe says, and evaluate if it asks for that.

    Args:
        resume: Go on with the run in the folder, however far it came; the recipe must be the same.
        overwrite: Replace the results of an earlier run in the folder.

    Raises:
        UserError: recipe, data, model or folder cannot be used; before weights are loaded.
        NonFiniteError: the run diverged; weights and checkpoints are of the last good step.
    """
    if recipe.kind != "unlearn":
        raise UserError(f"{recipe.name} is a recipe to fine-tune: use `unlearn finetune`.")
    check_launch()
    check_folder(recipe, resume, overwrite)
    suite = _suite(recipe)
    refusals = read_refusals(recipe.data.refusals)
    args: Any = recipe.arguments()
    forget, retain = forget_and_retain(recipe.data)
    request = Request(recipe, forget, resume=resume)
    retain = request.keep_out(retain)
    check_disjoint(forget, retain, recipe.data.allow_overlap)
    tokenizer = load_tokenizer(recipe.model)
    check_model(recipe.model, tokenizer)
    encoder = _encoder(tokenizer, recipe.data)
    _check_encodes(encoder, forget, "the forget set", recipe.model)
    _check_encodes(encoder, retain, "the retain set", recipe.model)
    check_packages(args)
    _check_engine(recipe, args)
    during = _during(recipe, encoder)
    if resume and during is not None:
        during.check_earlier()
    standing = standing_of(recipe, resume)
    if standing.trained:
        run = _go_on(recipe, suite, encoder)
        request.asked()  # by a run of an older version, which kept no ledger
        request.done(run.evaluation)
        return run
    set_seed(args.seed)  # a fresh adapter is random
    model = load_model(recipe.model)
    kept = _Kept(model)
    trainer = UnlearnTrainer(
        model,
        args,
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        encoder=encoder,
        refusals=refusals,
        evaluate_model=None
        if during is None
        else lambda current: during(current, trainer.state.global_step),
        allow_overlap=recipe.data.allow_overlap,
    )
    begin(recipe, resume)
    request.asked()
    trainer.train(resume_from_checkpoint=standing.checkpoint)
    if during is not None and trainer.is_world_process_zero():
        during.finish()
    run = _finish(trainer, recipe, kept, suite, encoder)
    request.done(run.evaluation)
    return run


def run_alternates(
    recipe: Recipe, file: Path, *, repeats: int = 5, seed: int = 0, **sampling: Any
) -> int:
    """Let the model of a recipe make up alternates of its forget set; write them as JSON lines.

    Args:
        sampling: Other arguments of `alternate_answers`.

    Returns:
        The number of rows written: up to `repeats` of every forget row.
    """
    if recipe.kind != "unlearn":
        raise UserError(f"{recipe.name} is a recipe to fine-tune: it has no forget set.")
    if file.exists() or file.suffix != ".jsonl":
        raise UserError(f"{file}: expected a new file that ends in .jsonl.")
    pairs, _ = forget_and_retain(recipe.data)
    encoder = _encoder(load_tokenizer(recipe.model), recipe.data)
    model: nn.Module = load_model(recipe.model).to(PartialState().device)
    found = alternate_answers(model, encoder, pairs, repeats=repeats, seed=seed, **sampling)
    if not found:
        raise UserError("The model made up nothing but empty answers and the original ones.")
    write_pairs(file, found)
    return len(found)


@alone()
def run_evaluate(
    model: ModelSettings,
    suite: Suite,
    data: DataSettings,
    output_dir: Path | None,
    *,
    reference: str | Path | None = None,
    show_forget_text: bool = False,
    load: Callable[[ModelSettings], nn.Module] = load_model,
) -> Evaluation:
    """Evaluate a model from a folder or the hub.

    Args:
        data: Of which template, max_length and truncate are read.
        output_dir: For records.jsonl and scores.json; None: nothing is written.
        reference: records.jsonl of a model that never saw the forget set.
        show_forget_text: See write_records.
        load: Gives the model.
    """
    check_launch()
    if output_dir is not None:
        check_output(output_dir, "--output")
    if reference is not None:
        read_records(reference)
    if suite.template is not None:  # the model's own may be one that its tokenizer lacks
        data = replace(data, template=suite.template)
    encoder = _encoder(load_tokenizer(model), data)
    state = PartialState()
    loaded: nn.Module = load(model).to(state.device).eval()
    if output_dir is not None:
        take(output_dir)
    return evaluate(
        suite,
        loaded,
        encoder,
        output_dir,
        reference_records=reference,
        show_forget_text=show_forget_text,
    )


class _Kept:
    """What training changes in a model and must be put back before it is saved."""

    def __init__(self, model: Any) -> None:
        named = model.named_parameters(remove_duplicate=False)  # a tied head has two names
        self.dtypes = {name: parameter.dtype for name, parameter in named}
        self.use_cache = getattr(model.config, "use_cache", None)

    def restore(self, model: Any) -> None:
        """Go back to the dtype that the weights were loaded in; switch the cache on again."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.dtypes and parameter.dtype != self.dtypes[name]:
                    parameter.data = parameter.data.to(self.dtypes[name])
        if self.use_cache is not None:
            model.config.use_cache = self.use_cache

    def cast(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give gathered weights in the dtype that they were loaded in."""
        return {
            name: value.to(self.dtypes.get(name, value.dtype)) for name, value in weights.items()
        }


def _finish(
    trainer: SavingTrainer, recipe: Recipe, kept: _Kept, suite: Suite | None, encoder: Encoder
) -> Run:
    """Save model, tokenizer and log; evaluate."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    folder = recipe.output_dir
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not sharded:
        kept.restore(model)

    def save(target: Path) -> None:
        if sharded:
            trainer._save(str(target), kept.cast(trainer.whole_weights()))
        else:
            model.save_pretrained(target)
            encoder.tokenizer.save_pretrained(target)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(target / TRAINER_STATE_NAME))
            if warning := unmerged_warning(recipe, target):
                (target / WARNING).write_text(f"{warning}\n", encoding="utf-8")

    save_model(folder, save, by_all=sharded)
    evaluation = None
    if suite is not None and sharded:
        logger.warning(
            f"{folder} is saved but not evaluated: the weights are spread over the ranks. "
            f"Run: unlearn eval {folder} --suite {suite.name}"
        )
    elif suite is not None:
        trainer.optimizer = trainer.lr_scheduler = None  # their memory is needed now
        model.zero_grad(set_to_none=True)
        evaluation = _evaluate(recipe, suite, model, encoder)
    return Run(folder, trainer.state.log_history, evaluation, unmerged_warning(recipe, folder))


def _go_on(recipe: Recipe, suite: Suite | None, encoder: Encoder) -> Run:
    """Finish a run whose model is saved: evaluate what is not evaluated yet."""
    begin(recipe, resume=True)
    folder, state = recipe.output_dir, PartialState()
    evaluation = None if suite is None else saved_evaluation(recipe, suite)
    if suite is not None and evaluation is None:
        if state.is_main_process:
            logger.warning(f"{folder} is trained: only the evaluation is left.")
        model: nn.Module = load_model(saved_model(recipe)).to(state.device)
        evaluation = _evaluate(recipe, suite, model, encoder)
    elif state.is_main_process:
        logger.warning(f"{folder} is finished: nothing is left to do.")
    return Run(folder, saved_log(folder), evaluation, unmerged_warning(recipe, folder))


def _evaluate(recipe: Recipe, suite: Suite, model: nn.Module, encoder: Encoder) -> Evaluation:
    assert recipe.evaluate is not None
    return evaluate(
        suite,
        model.eval(),
        encoder,
        recipe.output_dir / EVALUATION,
        reference_records=recipe.evaluate.reference,
        show_forget_text=recipe.evaluate.show_forget_text,
    )


def _suite(recipe: Recipe) -> Suite | None:
    if recipe.evaluate is None:
        return None
    if recipe.data.task_id is not None:
        raise UserError(
            f"data.task_id is {recipe.data.task_id!r}, but a suite knows the official splits only "
            "(task 1). Set evaluate=null."
        )
    if recipe.evaluate.reference is not None:
        read_records(recipe.evaluate.reference)
    return recipe.suite()


def _check_engine(recipe: Recipe, args: UnlearnConfig) -> None:
    """Refuse what the engine of this launch cannot do, before weights are loaded."""
    check_engine(
        args,
        args.build_objective(),
        combination=args.build_combination(),
        combine=args.combine,
        mask=args.mask,
        four_bit=recipe.model.four_bit is not None,
    )


def _during(recipe: Recipe, encoder: Encoder) -> DuringTraining | None:
    """Make what evaluates during training, if the recipe has a suite."""
    suite, settings = recipe.suite(during=True), recipe.evaluate
    if suite is None or settings is None:
        return None
    if settings.target is not None:
        read_records(settings.target)
    folder = recipe.output_dir / EVALUATION
    return DuringTraining(folder, suite, encoder, settings.reference, settings.target)


def _encoder(tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> Encoder:
    return Encoder(tokenizer, data.template, data.max_length, data.truncate, data.system)


def _check_encodes(encoder: Encoder, pairs: Sequence[QA], where: str, model: ModelSettings) -> None:
    """Refuse rows that cannot become tokens, or more tokens than the model reads."""
    try:
        encoded = encoder.pairs([pair.question for pair in pairs], [pair.answer for pair in pairs])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    check_context([len(one.ids) for one in encoded], context_length(model), where)
