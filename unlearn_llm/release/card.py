"""The model card of a release: what was done, what was measured, and what that does not show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn_llm.evaluation.report import side_by_side
from unlearn_llm.exchange.model_index import model_index
from unlearn_llm.leaderboard.runs import scheme
from unlearn_llm.recipe import Recipe
from unlearn_llm.release.change import Change

PUBLIC = ("tofu/", "synthetic/")
LIMITS = """\
- The scores say what these tests found. They do not show that nothing is left: see `unlearn attack`
  for tests that try to get it back, and compare with a model that never saw the rows.
- Whoever has this model and the one before can tell what was forgotten better than from either.
- Technical evidence, not legal advice."""
ADAPTER = """\
> **This is an adapter. The base model still holds what was to be forgotten**, and gives it to
> whoever loads it without the adapter."""


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        recipe: Of the run.
        entries: Its ledger.
        change: None: not measured.
        scanned: Were the files searched for text of the forget rows?
        details: What scores.json holds; None: not evaluated.
        base: Hub id of the model that was unlearned, if it has one.
    """

    recipe: Recipe
    entries: Sequence[Mapping[str, Any]]
    change: Change | None
    scanned: bool
    details: Mapping[str, Any] | None
    base: str | None
    adapter: bool


def card(name: str, facts: Facts) -> str:
    """Write the card, in Markdown, with the scores as its front matter, too."""
    details = facts.details or {"suite": {"name": "none", "split": "", "limit": 0}, "scores": {}}
    parts = [
        model_index(details, name, facts.base, relation="adapter" if facts.adapter else "finetune"),
        f"# {name}\n",
        *([ADAPTER + "\n"] if facts.adapter else []),
        "A language model after unlearning with unlearn_llm.\n",
        "## Unlearning\n",
        _table(("what", "how"), _unlearning(facts)),
        "## Scores\n",
        _scores(facts.details),
        "## Limits\n",
        LIMITS + "\n",
    ]
    return "\n".join(parts)


def _unlearning(facts: Facts) -> list[tuple[str, str]]:
    asked = [entry for entry in facts.entries if entry["event"] == "asked"]
    source = facts.recipe.data.forget or ""
    rows = sum(entry["forget_rows"] for entry in asked)
    return [
        ("objective", facts.recipe.objective().name),
        ("method", scheme(facts.recipe.train)),
        # The name of a file may tell whom it is about.
        ("forget set", source if source.startswith(PUBLIC) else "private"),
        ("rows asked to be forgotten", f"{rows} in {len(asked)} requests"),
        ("done", str(facts.entries[-1]["time"])),
        ("weights", "not compared with the original" if not facts.change else str(facts.change)),
        ("forgotten text in these files", "none found" if facts.scanned else "not looked for"),
    ]


def _scores(details: Mapping[str, Any] | None) -> str:
    if details is None:
        return "Not measured.\n"
    (scores,) = side_by_side({"model": details}).values()
    rows = [
        (name, score["text"], score["note"] or "")
        for name, score in scores.items()
        if "/" not in name
    ]
    suite = details["suite"]
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    made = f"Suite `{suite['name']}`, split {suite['split']}; {versions}.\n"
    return f"{_table(('score', 'value', 'note'), rows)}\n{made}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)
