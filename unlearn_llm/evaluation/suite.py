"""Suites: which questions are put to a model, what is measured, and which scores are made of it.

A suite is a YAML file in `eval/`. Running one is evaluate.py's business.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unlearn_llm.data_sets import DATA_SETS
from unlearn_llm.errors import RecipeError
from unlearn_llm.evaluation import options as aggregate_options
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.strict import validated
from unlearn_llm.registry import did_you_mean
from unlearn_llm.resources import EVAL
from unlearn_llm.yaml_text import parse_yaml

JudgeKind = Literal["entailment", "similarity", "harmfulness", "choice"]
Limit = Annotated[int, Field(ge=1)] | Literal["all"]
JUDGES: tuple[JudgeKind, ...] = get_args(JudgeKind)


class Strict(BaseModel):
    """A part of a suite; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(Strict):
    """Which columns of the data the parts of a Sample are read from."""

    question: str | None = "question"
    """None: the answer is a text that follows nothing."""
    answer: str | None = "answer"
    """None: nobody knows a right answer, only whether the given one is harmful or refuses."""
    paraphrased: str | None = None
    """None: the answer takes its part in the truth ratio."""
    perturbed: str | None = None
    reference: str | None = None
    """What similarity and entailment compare with. None, or a column that the data lacks: the
    answer."""
    similar_to: str | None = None
    group: str | None = None
    """Whose row it is: a column with the author's or person's name, if the data has it."""


class Examples(Strict):
    """Questions with answers that stand before every prompt of a probe."""

    source: str
    """As a probe's."""
    text: str
    """How each is written; {question} and {answer} stand for the columns of these names."""


class Probe(Strict):
    """One set of questions put to a model, with the metrics taken on it."""

    source: str | None = None
    """As rows.load_rows takes it; `{split}` stands for the suite's split, `{holdout}` for the
    held-out one of the same size, `{authors}` for the suite's authors."""
    task: str | None = None
    """In place of a source: a task or group of lm-eval, by its name there."""
    shots: int | None = Field(default=None, ge=0)
    """Examples before a question of the task; None: the task's own number."""
    metrics: list[str] = Field(default_factory=list)
    """For a task its own keys ("acc_norm,none"); none given: all of them."""
    columns: Columns = Columns()
    limit: Limit | None = None
    """First rows that are used; None: the suite's limit."""
    where: dict[str, str] = Field(default_factory=dict)
    """Only rows with this text in this column."""
    prompt: str = "{question}"
    """What is asked; {question} stands for the row's question."""
    examples: Examples | None = None
    """Questions with answers that stand before every prompt."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Where an answer is cut; None: the suite's limit, which is also the greatest."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which an answer is cut."""
    rows_per_author: int | None = Field(default=None, ge=1)
    """For data without such a column: how many rows in line are one author's."""

    @model_validator(mode="after")
    def _check_source(self) -> "Probe":
        if (self.source is None) == (self.task is None):
            raise ValueError("give a source of rows, or a task of lm-eval; one of the two.")
        if self.task is None and "metrics" not in self.model_fields_set:
            raise ValueError("metrics is missing.")
        return self


class Intervals(Strict):
    """How the confidence intervals of the scores are made; see intervals.py."""

    resamples: int = Field(default=1000, ge=100)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    by: Literal["author", "row"] = "author"
    """What is drawn: authors with all their rows, where rows name one, or single rows."""
    seed: int = 0


class ScoreOf(Strict):
    """One score: an aggregate, and what it shall read."""

    aggregate: str
    options: dict[str, Any] = Field(default_factory=dict)


class Suite(Strict):
    """What is asked of a model and what is made of its answers.

    The fields above `probes` are what differs between runs; `Suite.load` takes them as keywords.
    """

    name: str
    split: str = "forget10"
    """The forget split: forget01, forget05, forget10."""
    authors: Literal["tofu", "synthetic"] = "tofu"
    """Whose rows `{authors}` stands for: TOFU's, or generated ones."""
    folder: str | None = None
    """Folder with the files of the data; None: the hub."""
    data_seed: int = 0
    """Seed of generated authors (`synthetic/...`)."""
    limit: Limit = "all"
    """First rows of every probe that are used. The papers: 300."""
    row_order: Literal["official", "closer_look"] = "official"
    """Order of the forget split's rows: TOFU's, or that of closer-look's and DualOptim(+)'s files.
    With a limit it decides which rows are used; row ids stay the numbers in TOFU's file."""
    objective_kind: Literal["targeted", "untargeted"] = "untargeted"
    """Whether the forget loss teaches a refusal; OVR then contains TFE."""
    refusals: str | None = None
    """File of refusal lines; None: the package's own."""
    seed: int = 0
    """Of the refusal line of each row."""
    max_new_tokens: int = Field(default=200, ge=1)
    template: str | None = None
    """Prompt template in place of the model's own; see encode.TEMPLATES."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of question and answer, in place of the model's setting (`data.max_length`)."""
    max_total_tokens: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and generation together (TOFU's code: 200); None: no such limit."""
    reference: str | None = None
    """records.jsonl of a model that never saw the forget set, for forget quality."""
    intervals: Intervals | None = Intervals()
    """None: scores without confidence intervals."""
    judges: dict[JudgeKind, str | None] = Field(default_factory=dict)
    """Models that read texts, on the hub or in a folder. None or absent: not measured."""
    proxies: bool | list[JudgeKind] = False
    """Take metrics that count words in place of those that need a judge: of every kind (true), or
    of the kinds listed. All scores made of them are named `..._proxy`: they are NOT comparable
    with published numbers."""
    tasks: list[str] | None = None
    """Only these of the probes; what is none of them is a task of lm-eval. None: all probes."""
    task_folders: list[str] = Field(default_factory=list)
    """Folders with lm-eval tasks of your own."""
    probes: dict[str, Probe]
    scores: dict[str, ScoreOf]

    @classmethod
    def load(cls, name_or_path: str | Path, **overrides: Any) -> "Suite":
        """Read a suite from a file, or by its name in `eval/`; keywords replace its fields.

        Raises:
            RecipeError: no such suite, an unknown key, a value that does not fit.
        """
        path = _find(str(name_or_path))
        content = _read(path)
        if isinstance(content.get("judges"), dict) and isinstance(overrides.get("judges"), dict):
            # Another judge of one kind leaves the others.
            overrides["judges"] = {**content["judges"], **overrides["judges"]}
        return validated(cls, {**content, **overrides}, path.name)

    def with_proxies(self) -> "Suite":
        """Give the suite with its proxies put in place and `_proxy` in the names, if it has any."""
        if not self.proxies:
            return self
        kinds = JUDGES if self.proxies is True else self.proxies
        probes = {
            name: probe.model_copy(
                update={"metrics": [aggregate_options.proxy_of(m, kinds) for m in probe.metrics]}
            )
            if probe.task is None
            else probe
            for name, probe in self.probes.items()
        }
        scores = {}
        for name, score in self.scores.items():
            replaced = aggregate_options.with_proxies(score.aggregate, score.options, kinds)
            changed = replaced != score.options
            scores[f"{name}_proxy" if changed else name] = score.model_copy(
                update={"options": replaced}
            )
        return self.model_copy(update={"probes": probes, "scores": scores})

    def source_of(self, probe: str) -> str:
        """Give the source of a probe as rows.load_rows takes it."""
        return self.filled(self.probes[probe].source or "")

    def reads_other_than(self, data_set: str) -> bool:
        """Does the suite read published data, and none of this data set?"""
        kinds = {(probe.source or "").partition("/")[0] for probe in self.probes.values()}
        return kinds <= {"", *DATA_SETS} and data_set not in kinds

    @property
    def own_probes(self) -> dict[str, Probe]:
        """The probes that are not lm-eval's."""
        return {name: probe for name, probe in self.probes.items() if probe.task is None}

    def filled(self, source: str) -> str:
        """Put the suite's own words in place of {authors}, {holdout} and {split}."""
        source = source.replace("{authors}", self.authors)
        holdout = self.split.replace("forget", "holdout")
        return source.replace("{holdout}", holdout).replace("{split}", self.split)

    def options_of(self, score: ScoreOf) -> dict[str, Any]:
        """Give the aggregate's options, with those that the suite decides."""
        wanted = aggregate_options.known(score.aggregate)
        decided = {"kind": self.objective_kind} if "kind" in wanted else {}
        given = {
            name: self.filled(value) if isinstance(value, str) else value
            for name, value in score.options.items()
        }
        return {**decided, **given}

    @model_validator(mode="before")
    @classmethod
    def _choose_tasks(cls, content: Any) -> Any:
        """Keep the probes that `tasks` names, and the scores that are made of these alone."""
        if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
            return content
        tasks, probes = content["tasks"], content.get("probes") or {}
        scores = content.get("scores") or {}
        return {
            **content,
            "probes": {name: probes.get(name, {"task": name}) for name in tasks},
            "scores": {name: s for name, s in scores.items() if probes_of(s) <= set(tasks)},
        }

    @model_validator(mode="after")
    def _check_names(self) -> "Suite":
        for name, probe in self.own_probes.items():
            for metric in probe.metrics:
                try:
                    METRICS[metric]
                except ValueError as error:
                    raise ValueError(f"probes.{name}.metrics: {error}") from error
        for name, score in self.scores.items():
            self._check_score(name, score)
        return self

    def _check_score(self, name: str, score: ScoreOf) -> None:
        """Refuse unknown aggregates and options, and what no probe measures."""
        try:
            known = aggregate_options.known(score.aggregate)
        except ValueError as error:
            raise ValueError(f"scores.{name}: {error}") from error
        for option in score.options:
            if option not in known:
                raise ValueError(
                    f"scores.{name}: {score.aggregate} has no option {option!r}."
                    f"{did_you_mean(option, known)} It has {', '.join(known)}."
                )
        probe, metric = score.options.get("probe"), score.options.get("metric")
        if probe is not None and probe not in self.probes:
            raise ValueError(
                f"scores.{name}: there is no probe {probe!r}.{did_you_mean(probe, self.probes)} "
                f"Known: {', '.join(self.probes)}."
            )
        if probe is not None and metric is not None and metric not in self.probes[probe].metrics:
            measured = self.probes[probe].metrics
            raise ValueError(
                f"scores.{name}: probe {probe!r} does not take the metric {metric!r}."
                f"{did_you_mean(metric, measured)}"
            )


def probes_of(score: Any) -> set[str]:
    """Name the probes that the options of a score name, wherever in them."""
    if isinstance(score, dict):
        named = {score["probe"]} if isinstance(score.get("probe"), str) else set()
        return named.union(*(probes_of(value) for value in score.values()))
    return set().union(*map(probes_of, score)) if isinstance(score, list) else set()


def suites() -> Iterator[str]:
    """List the names of the suites that come with the package."""
    yield from sorted(path.stem for path in EVAL.glob("*.yaml"))


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"There is no suite file {name}.")
        return path
    path = EVAL / f"{name}.yaml"
    if not path.is_file():
        known = list(suites())
        raise RecipeError(
            f"Unknown suite {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}. "
            "Or give the path of a .yaml file."
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path.name}: not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(
            f"{path.name}: cannot be read ({error.strerror}); give another file, or change that."
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path.name}: expected keys such as probes: and scores:.")
    return content


def as_plain(suite: Suite) -> Mapping[str, Any]:
    """Give the suite as plain values, for JSON and YAML."""
    return suite.model_dump(mode="json")
