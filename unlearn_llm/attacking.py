"""`unlearn attack`: models under all attacks, beside a gold model under the same."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

import unlearn_llm.attacks  # noqa: F401  registers the names of the attacks
from unlearn_llm import recipe_files
from unlearn_llm.attacks.base import ATTACKS, Fact, Material, Subject, options_of
from unlearn_llm.attacks.campaign import PLAIN, Findings, details, judge, run_attacks
from unlearn_llm.attacks.verdict import Rules
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluating import FROM_RUN, four_bit_of_run
from unlearn_llm.evaluation.provenance import describe_model, versions
from unlearn_llm.evaluation.records import write_json
from unlearn_llm.folders import alone, check_output, take
from unlearn_llm.launch import check_launch
from unlearn_llm.model_files import check_model
from unlearn_llm.models import ModelSettings, load_model, load_tokenizer
from unlearn_llm.private import private_folder
from unlearn_llm.recipe import DataSettings, Recipe
from unlearn_llm.recipe_check import Place, build, check_section
from unlearn_llm.results import RECIPE_FILE
from unlearn_llm.rows import load_rows, to_pairs
from unlearn_llm.safe_text import folder_name

ATTACKS_FILE = "attacks.json"
JOURNAL = "journal.json"
GOLD = "gold"
SECTIONS = ("model", "data", "rules")
TOFU_ROWS_OF_AUTHOR = 20
Details = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is asked of `unlearn attack`.

    Attributes:
        models: Folders or hub ids.
        gold: A model that never saw the forget set; None: no verdict above "suppressed".
        forget, retain: Sources of rows; None: those of the run that made the first model.
        attacks: Names; empty: all.
        overrides: "data.template=plain", "rules.margin=0.02", "sampling.samples=4".
        limit: Most forget rows, drawn by data.seed; None: all.
        output: Folder; one folder per model in it.
    """

    models: Sequence[str]
    gold: str | None
    output: Path
    forget: str | None = None
    retain: str | None = None
    attacks: Sequence[str] = ()
    overrides: Sequence[str] = ()
    limit: int | None = None
    max_new_tokens: int = 200


@alone()
def attack_models(request: Request) -> dict[str, Details]:
    """Attack gold and the models; write attacks.json of each; give their contents by model.

    Finished attacks are kept in journal.json and not done again.

    Raises:
        UserError: before the first weights are loaded, if the mistake is in what was given.
    """
    check_launch()
    check_output(request.output, "--output")
    if PartialState().num_processes > 1:
        raise UserError("unlearn attack runs in one process; start it without a launcher.")
    attacks = _options(request)
    rules = _rules(request)
    sources = _sources(request)
    material = read_material(sources, request.limit)
    subjects = {
        name: _subject(name, request, sources)
        for name in dict.fromkeys([*request.models, *filter(None, [request.gold])])
    }
    for name in request.models:
        take(request.output / folder_name(str(Path(name))))
    if request.gold is not None:
        take(request.output / GOLD)
    findings: dict[str, Findings] = {}
    gold = None
    if request.gold is not None:
        folder = request.output / GOLD
        gold = run_attacks(
            subjects[request.gold], material, attacks, private_folder(folder) / JOURNAL
        )
    found = {}
    for name in request.models:
        folder = request.output / folder_name(str(Path(name)))
        findings[name] = run_attacks(
            subjects[name], material, attacks, private_folder(folder) / JOURNAL
        )
        outcome = judge(findings[name], gold, material, rules)
        found[name] = {
            **details(outcome, findings[name], gold, rules),
            "forget": sources.forget,
            "forget_rows": len(material.forget),
            "options": {attack: options_of(attack, given) for attack, given in attacks.items()},
            "model": _describe(subjects[name]),
            "gold": _describe(subjects[request.gold]) if request.gold else None,
            "versions": versions(),
        }
        write_json(folder / ATTACKS_FILE, found[name])
        subjects[name].release()
    return found


def read_material(data: DataSettings, limit: int | None = None) -> Material:
    """Read the rows that attacks need.

    Of "tofu/forgetNN" and "synthetic/forgetNN" the perturbed file is read, which has the same rows
    with paraphrases and wrong answers, and "retain_perturbed" for the probe.
    """
    assert data.forget is not None
    kind = data.forget.partition("/")[0]
    named = re.fullmatch(r"(tofu|synthetic)/forget[0-9]{2}", data.forget)
    forget = _facts(f"{data.forget}_perturbed" if named else data.forget, data)
    if limit is not None and limit < len(forget):
        chosen = random.Random(data.seed).sample(range(len(forget)), limit)
        forget = [forget[place] for place in sorted(chosen)]
    return Material(
        tuple(forget),
        tuple(_facts(data.retain, data)) if data.retain else (),
        tuple(_facts(f"{kind}/retain_perturbed", data)) if named else (),
    )


def _facts(source: str, data: DataSettings) -> list[Fact]:
    rows = load_rows(source, folder=data.folder, seed=data.seed)
    pairs = to_pairs(rows, source, data.question_column, data.answer_column)
    return [
        Fact(
            str(number),
            pair.question,
            pair.answer,
            wrong=_texts(row.get("perturbed_answer")),
            group=_group(source, number, row),
            **{
                name: row[name]
                for name in (
                    "paraphrased_question",
                    "paraphrased_answer",
                    "translated_question",
                    "translated_answer",
                )
                if isinstance(row.get(name), str)
            },
        )
        for number, (row, pair) in enumerate(zip(rows, pairs, strict=True))
    ]


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(text) for text in value or ())


def _group(source: str, number: int, row: Mapping[str, Any]) -> str | None:
    if source.startswith("tofu/"):
        return str(number // TOFU_ROWS_OF_AUTHOR)
    author = row.get("author")
    return str(author) if author else None


def _options(request: Request) -> dict[str, dict[str, Any]]:
    """Settle attacks and their options, the plain question first."""
    names = list(request.attacks) or list(ATTACKS)
    given: Details = {}
    of_attacks = [text for text in request.overrides if text.split(".")[0] not in SECTIONS]
    recipe_files.override(given, of_attacks)
    for name in given:
        if name not in names:
            raise UserError(f"{name}: no attack that runs; these do: {', '.join(names)}.")
    ordered = sorted(dict.fromkeys(names), key=lambda name: (name != PLAIN, name))
    options = {name: dict(given.get(name) or {}) for name in ordered}
    for name in ordered:
        options_of(name, options[name])
    return options


def _rules(request: Request) -> Rules:
    document: Details = {"rules": {}}
    given = [text for text in request.overrides if text.startswith("rules.")]
    recipe_files.override(document, given)
    check_section(Rules, document["rules"], "rules", Place("attack", given))
    rules: Rules = build(Rules, document["rules"])
    return rules


def _sources(request: Request) -> DataSettings:
    """Settle where rows come from: what was given, else what the first model's run names."""
    data = _settings(request.models[0], request)[1]
    data = replace(data, forget=request.forget or data.forget, retain=request.retain or data.retain)
    if data.forget is None:
        raise UserError(
            f"attack: {request.models[0]} does not say what it forgot (it has no {RECIPE_FILE} of "
            "a run to unlearn). Give --forget SOURCE, such as tofu/forget10 or a file."
        )
    return data


def _settings(name: str, request: Request) -> tuple[ModelSettings, DataSettings]:
    """Settle model and data of one model, as the run that made it had them."""
    document: Details = {"model": {"path": name}, "data": {}}
    made_by = Path(name).expanduser() / RECIPE_FILE
    if made_by.is_file():
        run = Recipe.load(made_by)
        section = run.document["data"]
        document["model"] |= four_bit_of_run(run, Path(name).expanduser())
        kept = (*FROM_RUN, "forget", "retain", "question_column", "answer_column")
        document["data"] = {key: section[key] for key in kept if key in section}
    given = [text for text in request.overrides if text.startswith(("model.", "data."))]
    recipe_files.override(document, given)
    place = Place("attack", [text.partition("=")[0] for text in given])
    check_section(ModelSettings, document["model"], "model", place)
    check_section(DataSettings, document["data"], "data", place)
    return build(ModelSettings, document["model"]), build(DataSettings, document["data"])


def _subject(name: str, request: Request, sources: DataSettings) -> Subject:
    model, data = _settings(name, request)
    has_run = (Path(name).expanduser() / RECIPE_FILE).is_file()
    data = data if has_run else sources  # gold is asked in the words of the first model
    tokenizer = load_tokenizer(model)
    check_model(model, tokenizer)
    encoder = Encoder(tokenizer, data.template, data.max_length, data.truncate, data.system)
    device = PartialState().device
    return Subject(
        lambda: load_model(model).to(device), encoder, max_new_tokens=request.max_new_tokens
    )


def _describe(subject: Subject) -> Details:
    return describe_model(subject.model, subject.encoder)
