"""Runs attacks on a model, keeps what is finished, and sets it beside the gold model."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unlearn_llm.attacks.base import (
    ATTACKS,
    Material,
    NotApplicable,
    NotMeasured,
    Subject,
    Trial,
    options_of,
)
from unlearn_llm.attacks.verdict import Comparison, Rules, Verdict, compare, decide
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.provenance import fingerprint
from unlearn_llm.evaluation.records import as_json, write_whole

PLAIN = "plain"
ANY = "any attack"
"""The most that any attack brought back of a row as text."""
Options = Mapping[str, Mapping[str, Any]]
"""Options by attack; an empty mapping: the defaults."""


@dataclass
class Findings:
    """What the attacks on one model brought.

    Attributes:
        trials: By attack.
        not_measured: Attack to reason: the attack would have been possible with more data.
        not_applicable: Attack to reason: this model has nothing to attack so.
        seconds: By attack.
    """

    trials: dict[str, list[Trial]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A model beside gold: comparisons trial by trial, and the verdict."""

    comparisons: list[Comparison]
    verdict: Verdict


def run_attacks(
    subject: Subject, material: Material, attacks: Options, journal: Path | None = None
) -> Findings:
    """Attack one model, one attack after the other.

    Args:
        journal: A JSON file. What it holds of the same model, rows and options is not done
            again; it is written after every attack. It belongs into private/: by its hashes a
            guess of all rows could be tried.
    """
    findings = Findings()
    kept = _read_journal(journal)
    key = _key(subject, material)
    for name, given in attacks.items():
        options = options_of(name, given)
        of_attack = _digest([key, name, options])
        entry = kept.get(name)
        if entry is None or entry["key"] != of_attack:
            entry = {"key": of_attack, **_run_one(name, subject, material, options)}
            kept[name] = entry
            if journal is not None:
                write_whole(journal, as_json({"attacks": kept}, indent=2), private=True)
        _add(findings, name, entry)
    return findings


def judge(
    findings: Findings, gold: Findings | None, material: Material, rules: Rules | None = None
) -> Outcome:
    """Compare a model with gold under the same attacks, and decide."""
    rules = rules or Rules()
    groups = {fact.id: fact.group for fact in material.forget}
    ours, theirs = _by_name(findings), _by_name(gold) if gold else {}
    for name, attack_trials in findings.trials.items():
        # What has no object in gold (an adapter) leaves gold as it answers the plain question.
        if gold and name in gold.not_applicable and PLAIN in theirs:
            theirs.update({trial.name: theirs[PLAIN] for trial in attack_trials})
    comparisons = [
        compare(
            name,
            trial.values,
            theirs[name].values if name in theirs else None,
            groups,
            trial.is_text,
            rules,
        )
        for name, trial in ours.items()
    ]
    if ours:
        shared = [name for name in ours if name in theirs] or list(ours)
        most = _any({name: ours[name] for name in shared})
        most_of_gold = _any({name: theirs[name] for name in shared if name in theirs})
        if most:
            comparisons.append(compare(ANY, most, most_of_gold or None, groups, True, rules))
    missing = {n: "not chosen" for n in ATTACKS if not _has(findings, n)}
    return Outcome(comparisons, decide(comparisons, {**missing, **findings.not_measured}, rules))


def details(
    outcome: Outcome, findings: Findings, gold: Findings | None, rules: Rules
) -> dict[str, Any]:
    """Give everything as JSON values: rows by id, no texts."""
    return {
        "verdict": asdict(outcome.verdict),
        "comparisons": [asdict(comparison) for comparison in outcome.comparisons],
        "rules": asdict(rules),
        "not_applicable": findings.not_applicable,
        "rows": {
            "model": {name: dict(t.values) for name, t in _by_name(findings).items()},
            "gold": {name: dict(t.values) for name, t in _by_name(gold).items()} if gold else None,
        },
        "details": {
            "model": {name: dict(t.details) for name, t in _by_name(findings).items()},
            "gold": {name: dict(t.details) for name, t in _by_name(gold).items()} if gold else None,
        },
        "seconds": findings.seconds,
    }


def _run_one(
    name: str, subject: Subject, material: Material, options: Mapping[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        trials = ATTACKS[name](subject, material, **options)
    except NotMeasured as reason:
        return {"not_measured": str(reason)}
    except NotApplicable as reason:
        return {"not_applicable": str(reason)}
    plain = [{**asdict(t), "values": dict(t.values), "details": dict(t.details)} for t in trials]
    return {"trials": plain, "seconds": round(time.perf_counter() - started, 3)}


def _add(findings: Findings, name: str, entry: Mapping[str, Any]) -> None:
    if "not_measured" in entry:
        findings.not_measured[name] = entry["not_measured"]
    elif "not_applicable" in entry:
        findings.not_applicable[name] = entry["not_applicable"]
    else:
        findings.trials[name] = [Trial(**trial) for trial in entry["trials"]]
        findings.seconds[name] = entry["seconds"]


def _by_name(findings: Findings) -> dict[str, Trial]:
    return {trial.name: trial for trials in findings.trials.values() for trial in trials}


def _any(trials: Mapping[str, Trial]) -> dict[str, float]:
    most: dict[str, float] = {}
    for trial in trials.values():
        if trial.is_text:
            for row, value in trial.values.items():
                most[row] = max(value, most.get(row, 0.0))
    return most


def _has(findings: Findings, name: str) -> bool:
    return any(name in part for part in (findings.trials, findings.not_measured)) or (
        name in findings.not_applicable
    )


def _key(subject: Subject, material: Material) -> list[Any]:
    return [
        fingerprint(subject.model),
        _digest(asdict(material)),
        str(subject.encoder.template),
        subject.encoder.max_length,
        subject.max_new_tokens,
    ]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_journal(journal: Path | None) -> dict[str, Any]:
    if journal is None or not journal.is_file():
        return {}
    try:
        found: dict[str, Any] = dict(json.loads(journal.read_text(encoding="utf-8"))["attacks"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{journal} cannot be read. Remove it, and its attacks are made again."
        ) from error
    return found
