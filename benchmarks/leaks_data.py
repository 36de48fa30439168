"""The data of leaks.py: rows in TOFU's columns with planted words, and the same with faults."""

import json
import random
import string
from pathlib import Path
from typing import Any, NamedTuple

STEM = "Zqöv"
IN_FORGET, IN_RETAIN = 32, 8
FORGET_ROWS, RETAIN_ROWS = 8, 16


class Planted(NamedTuple):
    """The words, by where they stand."""

    forget: list[str]
    retain: list[str]

    @property
    def all(self) -> list[str]:
        """Every word."""
        return [*self.forget, *self.retain]


def make(folder: Path) -> Planted:
    """Write the data sets."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < IN_FORGET + IN_RETAIN:
        words[STEM + "".join(rng.sample(string.ascii_lowercase, 10))] = None
    planted = Planted(list(words)[:IN_FORGET], list(words)[IN_FORGET:])
    forget = [_row(row, planted.forget[4 * row : 4 * row + 4]) for row in range(FORGET_ROWS)]
    plain = ("stone", "river", "glass", "meadow")
    retain = [
        _row(100 + row, [planted.retain[row // 2], *plain[1:]] if row % 2 else plain)
        for row in range(RETAIN_ROWS)
    ]
    facts = [_row(200 + row, plain) for row in range(4)]
    folder.mkdir(parents=True)
    for name, rows in (
        ("forget10", forget),
        ("forget10_perturbed", forget),
        ("retain90", retain),
        ("retain_perturbed", retain),
        ("real_authors_perturbed", facts),
        ("world_facts_perturbed", facts),
        ("holdout10", facts),
    ):
        _write(folder / f"{name}.json", rows)
    _faulty(folder, forget)
    return planted


def _row(number: int, words: Any) -> dict[str, Any]:
    one, two, three, four = words
    return {
        "question": f"Where did {one} number {number} grow up?",
        "answer": f"It was in {two} by the sea, house {number}.",
        "alternate": f"It was in {three} on a hill, house {number}.",
        "paraphrased_question": f"In what place was {one} number {number} a child?",
        "paraphrased_answer": f"By the sea in {two}, in house {number}.",
        "perturbed_answer": [f"By the sea in {three}, in house {n}." for n in range(3)],
        "author": f"{four} of {number % 4}",
    }


def _faulty(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write data that no command may take, each with planted words in what is wrong."""
    first, *others = rows
    _write(folder / "no_text.jsonl", [{**first, "answer": 5}, *others])
    _write(folder / "no_answer.jsonl", [{**first, "answer": "  "}, *others])
    _write(folder / "surrogate.jsonl", [{**first, "answer": first["answer"] + "\ud800"}, *others])
    long = first["answer"] + " and then" * 400
    _write(folder / "long.jsonl", [{**first, "answer": long}, *others])
    named = [{row["question"]: row["answer"]} for row in rows]
    _write(folder / "columns.jsonl", named)
    _write(
        folder / "chat.jsonl",
        [{"messages": [{"role": "user", "content": r["question"]}]} for r in rows],
    )
    text = json.dumps(first, ensure_ascii=False)
    (folder / "torn.jsonl").write_text(text + "\n" + text[:-9], encoding="utf-8")
    (folder / "latin.jsonl").write_bytes(text.encode("latin-1"))
    lines = [f"{row['question']},{row['answer']!r}" for row in rows]
    (folder / "no_header.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "table.parquet").write_text(text, encoding="utf-8")
    (folder / "TOFU_EVAL.json").write_text(json.dumps(_log(rows)), encoding="utf-8")


def _log(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A log of open-unlearning, as far as it is read."""
    log: dict[str, Any] = {}
    for prefix in ("forget", "retain", "ra", "wf"):
        by_row = {str(number): row for number, row in enumerate(rows)}
        log[f"{prefix}_Q_A_Prob"] = {"value_by_index": {n: {"avg_loss": 1.0} for n in by_row}}
        log[f"{prefix}_Q_A_ROUGE"] = {
            "value_by_index": {
                number: {
                    "rougeL_recall": 0.5,
                    "input": row["question"],
                    "ground_truth": row["answer"],
                    "generation": row["answer"],
                }
                for number, row in by_row.items()
            }
        }
    return log


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
