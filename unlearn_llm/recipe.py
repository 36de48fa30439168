"""Recipes: one YAML file that reproduces one run, read into dataclasses, strictly.

Every key is a field of a dataclass: `model` of models.ModelSettings, `data` of DataSettings,
`train` of UnlearnConfig (of FinetuneConfig in a recipe of `kind: finetune`), `evaluate` of
EvaluateSettings. How files, names, variants and overrides work is in recipe_files.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import TrainingArguments

import unlearn_llm.losses  # noqa: F401  registers the names of the losses
from unlearn_llm import recipe_files
from unlearn_llm.combine import COMBINATIONS, Combination
from unlearn_llm.combine.base import build as build_combination
from unlearn_llm.config import UnlearnConfig, check_both_roles, check_mask, check_one_role
from unlearn_llm.encode import CHAT, TEMPLATES
from unlearn_llm.errors import RecipeError
from unlearn_llm.finetune import FinetuneConfig
from unlearn_llm.masks import MASKS, Mask
from unlearn_llm.masks.base import build as build_mask
from unlearn_llm.models import ModelSettings
from unlearn_llm.objective import Objective
from unlearn_llm.optim import OPTIMIZERS
from unlearn_llm.recipe_check import (
    Place,
    build,
    check_during,
    check_model,
    check_name,
    check_parameters,
    check_section,
)
from unlearn_llm.registry import did_you_mean
from unlearn_llm.schedule import SCHEDULES, Schedule
from unlearn_llm.yaml_text import dump_yaml

if TYPE_CHECKING:
    from unlearn_llm.evaluation.suite import Suite

STEPS_LOOKED_AT = 100
"""Enough to see which roles a schedule trains; the number of steps is not known here."""
Kind = Literal["unlearn", "finetune"]
SECTIONS = ("name", "kind", "about", "model", "data", "train", "evaluate", "published")


@dataclass(frozen=True)
class DataSettings:
    """Which rows, and how they become tokens. A source is what rows.load_rows takes."""

    forget: str | None = None
    """What is to be forgotten: "tofu/forget10", a file, a hub data set."""
    retain: str | None = None
    """What is to be kept."""
    train: list[str] = field(default_factory=list)
    """For `kind: finetune`: the sources to train on, one after the other."""
    folder: str | None = None
    """Folder with TOFU's files (forget10.json...); null: the hub."""
    task_id: int | str | None = None
    """For closer-look's files: forget the rows of this task; the other tasks of the forget file
    are retained with the retain file."""
    question_column: str | None = None
    answer_column: str | None = None
    """Names of the columns; null: question/answer, prompt/completion or messages."""
    template: str = CHAT
    """Tags around questions and answers: chat (the tokenizer's own template), plain, llama2..."""
    system: str | None = None
    """System prompt of a chat template; null: the template's own."""
    max_length: int = 512
    """Most tokens of a question with its answer."""
    truncate: bool = False
    """Cut longer answers; otherwise they are an error. What is cut away is not unlearned."""
    refusals: str | None = None
    """File of refusal answers, one per line; null: the package's own."""
    allow_overlap: bool = False
    """Accept rows that stand in the forget and in the retain set."""
    seed: int = 0
    """Seed of generated authors (synthetic/...)."""
    tokenizer_rows: list[str] = field(default_factory=list)
    """For model.new: the sources whose text a new tokenizer is trained on; empty: data.train."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Which suite measures the model at the end of the run."""

    suite: str = "tofu"
    """A name in eval/, or the path of a .yaml file."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the suite to replace. split, folder, data_seed, refusals, seed and objective_kind
    are those of the run unless they stand here."""
    reference: str | None = None
    """records.jsonl of a model that never saw the forget set, for forget quality."""
    during: dict[str, Any] = field(default_factory=dict)
    """Further fields to replace at the steps of train.eval_strategy, such as {limit: 40}."""
    target: str | None = None
    """records.jsonl of the model before unlearning, to be drawn beside the trade-off."""
    show_forget_text: bool = False
    """Write questions, answers and generations into records.jsonl, too, outside private/."""


@dataclass(frozen=True)
class Published:
    """Scores that the run should reach, as a paper prints them."""

    source: str
    scores: dict[str, float]
    scale: float = 100.0
    """1.0 in our scores.json is this much in the paper."""
    tolerance: dict[str, float] = field(default_factory=dict)
    """How far from the paper a score may be, on the paper's scale."""
    settings: list[str] = field(default_factory=list)
    """Overrides that come nearer to how the paper ran it."""


@dataclass(frozen=True)
class Recipe:
    """One run, validated. Nothing was loaded yet, no device touched."""

    name: str
    kind: Kind
    about: dict[str, str]
    """For the header: paper, data, settings, hardware... and launch, the command before `train`."""
    model: ModelSettings
    data: DataSettings
    train: dict[str, Any]
    """Arguments of UnlearnConfig or FinetuneConfig; see `arguments`."""
    evaluate: EvaluateSettings | None
    published: list[Published]
    document: dict[str, Any] = field(repr=False, default_factory=dict)
    """The whole recipe as plain values."""

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe by file or name ("tofu/phi-1.5/forget05/idk+gd/joint").

        Args:
            overrides: "train.seed=2"; values are YAML.

        Raises:
            RecipeError: one line with file, key, what was got and what was expected.
        """
        path, chosen = recipe_files.locate(str(name_or_path))
        where = recipe_files.display(path)
        document = recipe_files.resolve(
            recipe_files.read_document(path), chosen, recipe_files.name_of(path), where
        )
        overridden = recipe_files.override(document, overrides)
        return cls.parse(document, Place(where, overridden))

    @classmethod
    def parse(cls, document: dict[str, Any], place: Place) -> "Recipe":
        """Make a recipe of a resolved document; see `load`."""
        for key in document:
            if key not in SECTIONS:
                near = did_you_mean(key, SECTIONS)
                raise place.error(key, f"unknown section.{near} Known: {', '.join(SECTIONS)}.")
        kind = document.setdefault("kind", "unlearn")
        check_name(kind, get_args(Kind), "kind", place)
        sections: dict[str, Any] = {
            "model": ModelSettings,
            "data": DataSettings,
            "train": UnlearnConfig if kind == "unlearn" else FinetuneConfig,
        }
        if document.setdefault("evaluate", None) is not None:
            sections["evaluate"] = EvaluateSettings
        for section, settings in sections.items():
            check_section(settings, document.setdefault(section, {}), section, place)
        if not isinstance(document.setdefault("published", []), list):
            raise place.error("published", "expected a list.")
        for row in document["published"]:
            check_section(Published, row, "published", place)
        about = document.setdefault("about", {})
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
            raise place.error("about", "expected a mapping of text.")
        name = document.setdefault("name", "unnamed")
        _check_file_name(name, place)
        document["train"].setdefault("output_dir", f"outputs/{name}")
        recipe = cls(
            name=name,
            kind=kind,
            about=about,
            model=build(ModelSettings, document["model"]),
            data=build(DataSettings, document["data"]),
            train=document["train"],
            evaluate=build(EvaluateSettings, document["evaluate"])
            if "evaluate" in sections
            else None,
            published=[build(Published, row) for row in document["published"]],
            document=document,
        )
        _check_meaning(recipe, place)
        return recipe

    @property
    def output_dir(self) -> Path:
        """Where the results go."""
        return Path(self.train["output_dir"]).expanduser()

    def arguments(self) -> TrainingArguments:
        """Make the configuration of the run; this looks for devices.

        Raises:
            RecipeError: what transformers refuses, such as bf16 without a device for it.
        """
        settings = UnlearnConfig if self.kind == "unlearn" else FinetuneConfig
        try:
            return settings(**{**self.train, "output_dir": str(self.output_dir)})
        except (ValueError, ImportError) as error:
            reason = " ".join(f"{error} {'Install it.' * isinstance(error, ImportError)}".split())
            raise RecipeError(f"{self.name}: train: {reason}") from error

    def objective(self) -> Objective:
        """Make the objective without making the whole configuration."""
        return Objective.parse(
            self.setting("objective"),
            forget=self.setting("forget_parameters"),
            retain=self.setting("retain_parameters"),
            forget_weight=self.setting("forget_weight"),
            retain_weight=self.setting("retain_weight"),
        )

    def suite(self, *, during: bool = False) -> "Suite | None":
        """Load the suite for the end of the run, or that for its steps (during)."""
        if self.evaluate is None:
            return None
        # Here and not above: metrics take a second to import, and a mistyped key is told without.
        from unlearn_llm.evaluation.suite import Suite

        of_step = self.evaluate.during if during else {}
        changes = {**self.suite_settings(self.evaluate.suite), **self.evaluate.overrides, **of_step}
        return Suite.load(self.evaluate.suite, **changes)

    def suite_settings(self, suite: str) -> dict[str, Any]:
        """Give the fields of a suite that follow from the run."""
        from unlearn_llm.evaluation.suite import Suite  # here, as above

        named = {"folder": self.data.folder, "refusals": self.data.refusals}
        found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        found["data_seed"] = self.data.seed
        if self.kind == "unlearn":
            found["objective_kind"] = self.objective().forget.kind
            found["seed"] = self.setting("refusal_seed")
        source, _, split = (self.data.forget or "").partition("/")
        if source in ("tofu", "synthetic"):
            found |= {"authors": source, "split": split}
        if Suite.load(suite).reads_other_than(source):  # a TOFU folder has no safety prompts
            found = {k: v for k, v in found.items() if k not in ("folder", "authors", "split")}
        return found

    def to_yaml(self, file: str | None = None) -> str:
        """Write the recipe by itself: everything resolved, with a header for the reader.

        Args:
            file: Where it will stand, for the command in the header.
        """
        return header(self, file) + dump_yaml({key: self.document[key] for key in SECTIONS})

    def setting(self, name: str) -> Any:
        """Give a setting of UnlearnConfig: the recipe's, or the default of the field."""
        if name in self.train:
            return self.train[name]
        default = next(f for f in fields(UnlearnConfig) if f.name == name)
        return default.default if not callable(default.default_factory) else {}


def header(recipe: Recipe, file: str | None = None) -> str:
    """Make the comment above a recipe: what it is, how to run it, what it should reach."""
    about = dict(recipe.about)
    launch = about.pop("launch", "unlearn")
    verb = "train" if recipe.kind == "unlearn" else "finetune"
    lines = [recipe.name, ""]
    lines += [f"{key.capitalize():<9} {text}" for key, text in about.items()]
    lines.append(f"{'Model':<9} {recipe.model.path or 'new, random weights'}")
    lines.append(f"{'Run':<9} {launch} {verb} {file or recipe.name}")
    for row in recipe.published:
        expected = ", ".join(
            f"{name} {value:g}" + (f" (+-{row.tolerance[name]:g})" if name in row.tolerance else "")
            for name, value in row.scores.items()
        )
        lines.append(f"{'Expected':<9} {expected}. {row.source}")
        if row.settings:
            lines.append(f"{'':<9} there with {' '.join(row.settings)}")
    if recipe.kind == "unlearn" and not recipe.published:
        lines.append(f"{'Expected':<9} none published")
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _check_file_name(name: Any, place: Place) -> None:
    """A name becomes a folder under outputs/: it must not lead out of it."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
        raise place.error("name", f"expected up to 200 printable characters, got {name!r:.80}.")
    if not all(name.split("/")) or {".", ".."} & set(name.split("/")):
        raise place.error("name", f"expected parts such as tofu/mine, got {name!r}.")


def _check_meaning(recipe: Recipe, place: Place) -> None:
    """Refuse unknown names and what cannot work together."""
    if recipe.data.template != CHAT and ":" not in recipe.data.template:
        check_name(recipe.data.template, [CHAT, *TEMPLATES], "data.template", place)
    check_model(recipe.model, place)
    check_during(recipe.kind, recipe.train, recipe.document["evaluate"], place)
    if recipe.kind == "finetune":
        _check_finetune(recipe, place)
    else:
        _check_unlearn(recipe, place)
    if recipe.evaluate is not None:
        with place.naming("evaluate"):
            recipe.suite()
            recipe.suite(during=True)


def _check_finetune(recipe: Recipe, place: Place) -> None:
    if not recipe.data.train:
        raise place.error("data.train", "is missing: give the sources to train on.")
    for name in ("forget", "retain", "task_id"):
        if getattr(recipe.data, name) is not None:
            raise place.error(f"data.{name}", "is read by kind: unlearn only; use data.train.")


def _check_unlearn(recipe: Recipe, place: Place) -> None:
    if recipe.model.new is not None:
        raise place.error("model.new", "random weights hold nothing to forget; use kind: finetune.")
    for name in ("forget", "retain"):
        if getattr(recipe.data, name) is None:
            raise place.error(f"data.{name}", "is missing: give a file, tofu/SPLIT or a data set.")
    if recipe.data.train:
        raise place.error("data.train", "is read by kind: finetune only; use forget and retain.")
    with place.naming("train.objective"):
        objective = Objective.parse(recipe.setting("objective"))
    with place.naming("train.forget_parameters"):
        objective.forget.bind(recipe.setting("forget_parameters"))
    with place.naming("train.retain_parameters"):
        objective.retain.bind(recipe.setting("retain_parameters"))
    with place.naming("train.schedule"):
        schedule = SCHEDULES[recipe.setting("schedule")]
    with place.naming("train.schedule_parameters"):
        check_parameters(recipe.setting("schedule_parameters"), schedule)
        made = schedule(**recipe.setting("schedule_parameters"))
    _check_combine(recipe, made, place)
    _check_mask(recipe, made, place)
    with place.naming("train.forget_learning_rate"):
        rate = recipe.setting("forget_learning_rate")
        check_one_role(made, STEPS_LOOKED_AT, forget_learning_rate=rate)
    name = recipe.setting("optimizer")
    if name is None:
        return
    with place.naming("train.optimizer"):
        optimizer = OPTIMIZERS[name]
        check_one_role(made, STEPS_LOOKED_AT, optimizer=name)
    with place.naming("train.optimizer_parameters"):
        parameters = recipe.setting("optimizer_parameters")
        check_parameters(parameters, optimizer)
        optimizer([torch.zeros(1, requires_grad=True)], **parameters)  # it checks the values


def _check_combine(recipe: Recipe, schedule: Schedule, place: Place) -> None:
    name, parameters = recipe.setting("combine"), recipe.setting("combine_parameters")
    if name is None:
        if parameters:
            raise place.error("train.combine_parameters", "are given, but train.combine is null.")
        return
    with place.naming("train.combine"):
        cls = COMBINATIONS[name]
    with place.naming("train.combine_parameters"):
        check_parameters(parameters, cls)
        combination: Combination = build_combination(name, parameters)
    with place.naming("train.combine"):
        check_both_roles(
            schedule,
            STEPS_LOOKED_AT,
            name,
            combination,
            optimizer=recipe.setting("optimizer"),
            retain_weight=recipe.setting("retain_weight"),
        )


def _check_mask(recipe: Recipe, schedule: Schedule, place: Place) -> None:
    name, parameters = recipe.setting("mask"), recipe.setting("mask_parameters")
    if name is None:
        if parameters:
            raise place.error("train.mask_parameters", "are given, but train.mask is null.")
        return
    with place.naming("train.mask"):
        cls = MASKS[name]
    with place.naming("train.mask_parameters"):
        check_parameters(parameters, cls)
        mask: Mask = build_mask(name, parameters)
    with place.naming("train.mask"):
        check_mask(schedule, STEPS_LOOKED_AT, name, mask)
