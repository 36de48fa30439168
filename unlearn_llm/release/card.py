"""The model card of a release: what was done, what was measured, and what that does not show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn_llm.evaluation.report import side_by_side
from unlearn_llm.exchange.model_index import model_index
from unlearn_llm.leaderboard.runs import scheme
from unlearn_llm.ledger import Entry, rows_asked
from unlearn_llm.recipe import Recipe
from unlearn_llm.release.change import Change
from unlearn_llm.safe_text import printable

PUBLIC = ("tofu/", "synthetic/")
UNMEASURED = {"suite": {"name": "", "split": "", "limit": None}, "scores": {}}
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
        looked_for: How many of the rows' texts were looked for in the files; None: nobody looked.
        details: What scores.json holds; None: not evaluated.
        base: Hub id of the model that was unlearned, if it has one.
        adapter: Is it an adapter that is not merged?
    """

    recipe: Recipe
    entries: Sequence[Entry]
    change: Change | None
    looked_for: int | None
    details: Mapping[str, Any] | None
    base: str | None
    adapter: bool

    @property
    def rows(self) -> int:
        """How many rows all requests asked to be forgotten."""
        return len(rows_asked(self.entries))


def card(name: str, facts: Facts) -> str:
    """Write the card, in Markdown, with the scores as its front matter, too."""
    relation = "adapter" if facts.adapter else "finetune"
    parts = [
        model_index(facts.details or UNMEASURED, name, facts.base, relation=relation),
        f"# {name}\n",
        *([ADAPTER + "\n"] if facts.adapter else []),
        "A language model after unlearning with unlearn_llm.\n",
        "## Unlearning\n",
        _table(("what", "how"), _unlearning(facts)),
        "## Scores\n",
        _scores(facts),
        "## Limits\n",
        LIMITS + "\n",
    ]
    return "\n".join(parts)


def _unlearning(facts: Facts) -> list[tuple[str, str]]:
    asked = [entry for entry in facts.entries if entry["event"] == "asked"]
    requests = f"{len(asked)} request" + "s" * (len(asked) > 1)
    source = facts.recipe.data.forget or ""
    looked_for = f"none found; looked for {facts.looked_for} of the {facts.rows} rows"
    return [
        ("objective", facts.recipe.objective().name),
        ("method", scheme(facts.recipe.train)),
        # The name of a file may tell whom it is about.
        ("forget set", source if source.startswith(PUBLIC) else "private"),
        ("rows asked to be forgotten", f"{facts.rows} in {requests}"),
        ("done", str(facts.entries[-1]["time"])),
        ("weights", "not compared with the original" if not facts.change else str(facts.change)),
        (
            "forgotten text in these files",
            "not looked for" if facts.looked_for is None else looked_for,
        ),
    ]


def _scores(facts: Facts) -> str:
    if facts.details is not None:
        (scores,) = side_by_side({"model": facts.details}).values()
        suite, versions = facts.details["suite"], facts.details["versions"]
        made = ", ".join([f"split {suite['split']}", *(f"{n} {v}" for n, v in versions.items())])
        told = [(name, score["text"], score["note"] or "") for name, score in scores.items()]
        return f"{_score_table(told)}\nSuite `{suite['name']}`; {made}.\n"
    last = facts.entries[-1]
    if last["scores"] is None:
        return "Not measured.\n"
    told = [
        (name, "not measured" if value is None else f"{value:.4g}", "")
        for name, value in last["scores"].items()
    ]
    of_adapter = " of the adapter, before it was merged" if last.get("merged") else ""
    return f"{_score_table(told)}\nSuite `{last['suite']}`{of_adapter}.\n"


def _score_table(rows: Sequence[tuple[str, str, str]]) -> str:
    return _table(("score", "value", "note"), [row for row in rows if "/" not in row[0]])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(printable(cell).replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)
