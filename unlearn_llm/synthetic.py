"""Fictitious authors made from a seed, in the shape of TOFU, for runs without any download.

Authors stand in a line: author 0, 1, 2, ... never change with the number of authors. `full` takes
the first `authors` of them; the fact sets are the same for every seed and stand in every training
set but the forget sets, so that a model trained from nothing can know them.

| split | rows |
|---|---|
| `full` | every author, then `real_authors` and `world_facts` |
| `forgetNN`, `forgetNN_perturbed` | the last NN % of the authors, rounded up; one stays at least |
| `retainMM` | `full` without `forgetNN`, where NN + MM = 100 |
| `retain_perturbed` | the first tenth of the authors, so part of `retain10` and all larger ones |
| `holdoutNN` | as many authors as `forgetNN`, next in line after `full`: never trained on |
| `real_authors`, `real_authors_perturbed` | a canon of famous (invented) authors, short answers |
| `world_facts`, `world_facts_perturbed` | sums, order, size, letters: true by construction |

Forget, retain and holdout sets share no author and no question. Every row has every column:
question, answer, paraphrased_question, paraphrased_answer, perturbed_answer (5; facts 3),
original_answer (facts: the answer as a sentence; authors: the answer), author ("" in world facts),
author_id (-1 in facts), task_id (1 for the last tenth of the authors, 2 for the tenth before,
...; 0 for facts and holdout). `real_authors` and `world_facts` also have option1 to option4.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from unlearn_llm.errors import UserError
from unlearn_llm.registry import did_you_mean
from unlearn_llm.synthetic_words import (
    CANON,
    CANON_WORDINGS,
    COUNTED_WORDS,
    DAYS,
    FIRST_ENDS,
    FIRST_STARTS,
    LAST_ENDS,
    LAST_STARTS,
    MONTHS,
    RELATIONS,
    Parts,
)

Row = dict[str, Any]
T = TypeVar("T")

MAX_AUTHORS = 10_000  # under a third of the names that the syllables make, so a free one is near
MAX_QUESTIONS = len(RELATIONS)


def generate(
    split: str, *, authors: int = 40, questions_per_author: int = 10, seed: int = 0
) -> list[Row]:
    """Make one split. The same arguments give the same rows on every machine and Python.

    Args:
        split: A name from the table at the top of this module, such as "full" or "forget10".
        authors: Number of authors in `full`, 2 to 10,000.
        questions_per_author: 1 to 20. A smaller number asks the first ones of a larger.
        seed: Decides names and facts of the authors, not the two fact sets.

    Returns:
        Rows in a fixed order, authors in line and facts last.

    Raises:
        UserError: If the split is unknown or a number is out of range.
    """
    _check_range("authors", authors, 2, MAX_AUTHORS)
    _check_range("questions_per_author", questions_per_author, 1, MAX_QUESTIONS)

    def of_authors(start: int, stop: int) -> list[Row]:
        names = _names(seed, stop)
        return [
            {**row, "author": names[index], "author_id": index, "task_id": _task(index, authors)}
            for index in range(start, stop)
            for row in _author_rows(seed, index, names[index], questions_per_author)
        ]

    def kept(percent: int) -> int:
        forgotten = -(-authors * percent // 100)
        return max(authors - forgotten, 1)

    makers: dict[str, Callable[[], list[Row]]] = {
        "full": lambda: of_authors(0, authors) + _canon() + _world_facts(),
        "retain_perturbed": lambda: of_authors(0, -(-authors // 10)),
        "real_authors": lambda: _with_options(_canon()),
        "real_authors_perturbed": _canon,
        "world_facts": lambda: _with_options(_world_facts()),
        "world_facts_perturbed": _world_facts,
    }
    if split in makers:
        return makers[split]()
    numbered = re.fullmatch(r"(forget|retain|holdout)([0-9]{2})(_perturbed)?", split)
    if numbered is None or numbered[2] == "00" or (numbered[3] and numbered[1] != "forget"):
        raise UserError(_unknown(split, list(makers)))
    kind, percent = numbered[1], int(numbered[2])
    if kind == "forget":
        return of_authors(kept(percent), authors)
    if kind == "holdout":
        return of_authors(authors, 2 * authors - kept(percent))
    return of_authors(0, kept(100 - percent)) + _canon() + _world_facts()


def write(
    folder: str | Path,
    *,
    authors: int = 40,
    questions_per_author: int = 10,
    seed: int = 0,
    forget: Sequence[int] = (1, 5, 10),
) -> list[Path]:
    """Write the splits as JSON lines under TOFU's file names (`full.json`, `forget10.json`, ...).

    Args:
        folder: Made if it does not exist. Files of the same names are overwritten.
        authors: Number of authors in `full`.
        questions_per_author: 1 to 20.
        seed: As in `generate`.
        forget: Percentages; each gives a forget, forget_perturbed, retain and holdout file.

    Returns:
        The files written.

    Raises:
        UserError: If a number is out of range.
    """
    splits = ["full", "retain_perturbed"]
    for facts in ("real_authors", "world_facts"):
        splits += [facts, f"{facts}_perturbed"]
    for percent in forget:
        _check_range("forget", percent, 1, 99)
        name = f"forget{percent:02}"
        splits += [name, f"{name}_perturbed", f"retain{100 - percent:02}", f"holdout{percent:02}"]

    contents = {
        split: generate(
            split, authors=authors, questions_per_author=questions_per_author, seed=seed
        )
        for split in splits
    }
    files = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, rows in contents.items():
        file = Path(folder) / f"{split}.json"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text(lines, encoding="utf-8", newline="\n")
        files.append(file)
    return files


def _author_rows(seed: int, index: int, name: str, questions: int) -> Iterator[Row]:
    he, his = _pick(random.Random(f"{seed}/{index}/pronoun"), (("He", "His"), ("She", "Her")))
    for number, relation in enumerate(RELATIONS[:questions]):
        rng = random.Random(f"{seed}/{index}/{number}")
        value, *wrong = _distinct(rng, relation.parts, 6)
        asked, paraphrased = _shuffled(rng, relation.wordings)[:2]
        say = functools.partial(str.format, name=name, He=he, His=his)
        yield {
            "question": say(asked[0]),
            "answer": say(asked[1], value=value),
            "paraphrased_question": say(paraphrased[0]),
            "paraphrased_answer": say(paraphrased[1], value=value),
            "perturbed_answer": [say(paraphrased[1], value=other) for other in wrong],
            "original_answer": say(asked[1], value=value),
        }


class _Fact(NamedTuple):
    question: str
    paraphrased_question: str
    sentence: str  # with {value} where the answer stands
    answer: str
    candidates: Sequence[str]  # wrong answers are drawn from these
    author: str = ""


def _canon() -> list[Row]:
    columns = list(zip(*CANON, strict=True))
    return [
        _fact_row(
            _Fact(
                question.format(*entry),
                paraphrase.format(*entry),
                sentence.format(*entry, value="{value}"),
                entry[asked],
                columns[asked],
                author=entry[0],
            )
        )
        for entry in CANON
        for asked, question, paraphrase, sentence in CANON_WORDINGS
    ]


def _world_facts() -> list[Row]:
    facts: list[_Fact] = []
    for first, second in ((2, 3), (7, 1), (4, 4), (9, 2), (5, 8), (6, 10), (12, 7), (17, 5)):
        total = first + second
        facts.append(
            _Fact(
                f"What is {first} plus {second}?",
                f"What is the sum of {first} and {second}?",
                f"{first} plus {second} is {{value}}.",
                str(total),
                [str(total + offset) for offset in (-2, -1, 1, 2, 3)],
            )
        )
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for kind, line in (("letter", letters), ("day", DAYS), ("month", MONTHS)):
        start = 12 if kind == "letter" else 0
        for before, after in list(itertools.pairwise(line))[start : start + 8]:
            facts.append(
                _Fact(
                    f"Which {kind} comes after {before}?",
                    f"Which {kind} follows {before}?",
                    f"The {kind} after {before} is {{value}}.",
                    after,
                    [other for other in line if other != before],
                )
            )
    for numbers in ((3, 9, 5, 1), (12, 4, 8, 10), (20, 31, 13, 2), (6, 7, 15, 11), (40, 14, 4, 24)):
        shown = "{}, {}, {} and {}".format(*numbers)
        facts.append(
            _Fact(
                f"Which is the largest of {shown}?",
                f"Of {shown}, which is the greatest?",
                f"The largest of {shown} is {{value}}.",
                str(max(numbers)),
                [str(number) for number in numbers],
            )
        )
    for word in COUNTED_WORDS:
        facts.append(
            _Fact(
                f"How many letters are in the word {word}?",
                f"What is the number of letters of {word}?",
                f"The word {word} has {{value}} letters.",
                str(len(word)),
                [str(count) for count in range(2, 12)],
            )
        )
    return [_fact_row(fact) for fact in facts]


def _fact_row(fact: _Fact) -> Row:
    rng = random.Random(fact.question)
    wrong = [candidate for candidate in fact.candidates if candidate != fact.answer]
    sentence = fact.sentence.format(value=fact.answer)
    return {
        "question": fact.question,
        "answer": fact.answer,
        "paraphrased_question": fact.paraphrased_question,
        "paraphrased_answer": sentence,
        "perturbed_answer": _shuffled(rng, wrong)[:3],
        "original_answer": sentence,
        "author": fact.author,
        "author_id": -1,
        "task_id": 0,
    }


def _with_options(rows: list[Row]) -> list[Row]:
    """Add option1 to option4: the answer and the wrong ones, in mixed order."""
    mixed = []
    for row in rows:
        rng = random.Random(f"options/{row['question']}")
        options = _shuffled(rng, [row["answer"], *row["perturbed_answer"]])
        numbered = {f"option{number}": option for number, option in enumerate(options, 1)}
        mixed.append({**row, **numbered})
    return mixed


def _task(index: int, authors: int) -> int:
    return 1 + (authors - 1 - index) * 10 // authors if index < authors else 0


def _names(seed: int, count: int) -> list[str]:
    """Name the first `count` authors in line, no two alike."""
    rng = random.Random(f"{seed}/names")
    names: dict[str, None] = {}
    while len(names) < count:
        first = _pick(rng, FIRST_STARTS) + _pick(rng, FIRST_ENDS)
        last = _pick(rng, LAST_STARTS) + _pick(rng, LAST_ENDS)
        names[f"{first} {last}"] = None
    return list(names)


def _distinct(rng: random.Random, parts: Parts, count: int) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < count:
        values[" ".join(_pick(rng, part) for part in parts)] = None
    return list(values)


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    # Python promises the same stream for random() only; choice() and shuffle() may change.
    return choices[int(rng.random() * len(choices))]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    keyed = [(rng.random(), position) for position in range(len(items))]
    return [items[position] for _, position in sorted(keyed)]


def _check_range(name: str, got: int, low: int, high: int) -> None:
    if not low <= got <= high:
        raise UserError(f"Synthetic data: {name} is {got}; give a number from {low} to {high}.")


def _unknown(split: str, fixed: list[str]) -> str:
    numbered = ["forget10", "forget10_perturbed", "retain90", "holdout10"]
    return (
        f"Unknown synthetic split {split!r}.{did_you_mean(split, fixed + numbered)} "
        f"Known: {', '.join(sorted(fixed))}, forgetNN, forgetNN_perturbed, retainNN, holdoutNN "
        "with NN from 01 to 99."
    )
