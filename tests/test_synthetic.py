import calendar
import hashlib
import itertools
import json
import re
import subprocess
import sys

import pytest

from unlearn_llm.errors import UserError
from unlearn_llm.synthetic import MAX_QUESTIONS, generate, write
from unlearn_llm.synthetic_words import RELATIONS

COLUMNS = [
    "question",
    "answer",
    "paraphrased_question",
    "paraphrased_answer",
    "perturbed_answer",
    "original_answer",
    "author",
    "author_id",
    "task_id",
]
# Of the JSON of generate("full"); the same on CPython 3.10, 3.11, 3.12 and 3.13. If it changes,
# every number measured on the synthetic data changes with it.
FULL_SHA256 = "9728a0560dfed567e5cf523ecc8905b3f7f2232d60c74c5d5e916736c8b93087"


def authors_of(split, **sizes):
    return {row["author"] for row in generate(split, **sizes) if row["author_id"] >= 0}


def questions_of(split, **sizes):
    return {row["question"] for row in generate(split, **sizes)}


def test_the_default_data_never_changes():
    text = json.dumps(generate("full"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == FULL_SHA256


def test_rows_do_not_depend_on_the_hash_seed_of_the_process():
    program = "import json; from unlearn_llm.synthetic import generate as g; "
    program += "print(json.dumps([g('full'), g('world_facts'), g('holdout10')]))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


def test_another_seed_makes_other_authors_but_the_same_facts():
    assert authors_of("full", seed=0).isdisjoint(authors_of("full", seed=1))
    for facts in ("real_authors", "world_facts"):
        assert generate(facts, seed=0) == generate(facts, seed=1)


def test_an_author_does_not_change_with_the_sizes():
    small = generate("retain_perturbed", authors=20, questions_per_author=3)
    large = generate("retain_perturbed", authors=200, questions_per_author=20)
    questions_and_answers = [(row["question"], row["answer"]) for row in large]
    assert all((row["question"], row["answer"]) in questions_and_answers for row in small)


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("full", 40 * 10 + 40 + 43),
        ("forget01", 10),  # 0.4 authors, rounded up
        ("forget05", 20),
        ("forget10", 40),
        ("forget10_perturbed", 40),
        ("retain99", 39 * 10 + 83),
        ("retain95", 38 * 10 + 83),
        ("retain90", 36 * 10 + 83),
        ("retain_perturbed", 40),
        ("holdout10", 40),
        ("real_authors", 40),
        ("real_authors_perturbed", 40),
        ("world_facts", 43),
        ("world_facts_perturbed", 43),
    ],
)
def test_default_splits_have_these_sizes(split, rows):
    assert len(generate(split)) == rows


def test_two_hundred_authors_with_twenty_questions_have_the_shape_of_tofu():
    sizes = {"authors": 200, "questions_per_author": MAX_QUESTIONS}
    assert sum(row["author_id"] >= 0 for row in generate("full", **sizes)) == 4000
    assert len(generate("forget01", **sizes)) == 40
    assert len(generate("retain_perturbed", **sizes)) == 400


@pytest.mark.parametrize("percent", [1, 5, 10, 50, 90, 99])
@pytest.mark.parametrize("authors", [2, 7, 40])
def test_forget_and_retain_divide_full(percent, authors):
    forget = generate(f"forget{percent:02}", authors=authors)
    retain = generate(f"retain{100 - percent:02}", authors=authors)
    full = generate("full", authors=authors)
    facts = [row for row in full if row["author_id"] < 0]
    kept = len(retain) - len(facts)
    assert forget
    assert retain[:kept] + forget + facts == full
    assert retain[kept:] == facts


@pytest.mark.parametrize("percent", ["01", "10", "99"])
def test_forget_retain_and_holdout_share_no_author_and_no_question(percent):
    splits = [f"forget{percent}", f"retain{100 - int(percent):02}", f"holdout{percent}"]
    for number, split in enumerate(splits):
        for other in splits[number + 1 :]:
            assert authors_of(split).isdisjoint(authors_of(other))
            assert questions_of(split).isdisjoint(questions_of(other))


def test_holdout_is_as_large_as_forget_and_never_in_full():
    assert len(generate("holdout10")) == len(generate("forget10"))
    assert authors_of("holdout10").isdisjoint(authors_of("full"))


def test_smaller_forget_sets_lie_in_larger_ones():
    assert authors_of("forget01") < authors_of("forget05") < authors_of("forget10")


def test_retain_perturbed_lies_in_every_retain_set_down_to_a_tenth():
    assert authors_of("retain_perturbed") <= authors_of("retain10")


def test_training_sets_contain_the_facts():
    for facts in ("real_authors_perturbed", "world_facts_perturbed"):
        for split in ("full", "retain90", "retain01"):
            rows = generate(split)
            assert all(fact in rows for fact in generate(facts))


@pytest.mark.parametrize("split", ["full", "forget10", "holdout10", "real_authors", "world_facts"])
def test_every_row_has_every_column(split):
    for row in generate(split, questions_per_author=MAX_QUESTIONS):
        assert list(row)[: len(COLUMNS)] == COLUMNS
        texts = [row[column] for column in COLUMNS[:4]] + row["perturbed_answer"]
        assert all(text == text.strip() and text and "{" not in text for text in texts)


def test_fact_sets_have_four_options_with_the_answer_among_them():
    for split in ("real_authors", "world_facts"):
        for row in generate(split):
            options = [row[f"option{number}"] for number in (1, 2, 3, 4)]
            assert sorted(options) == sorted([row["answer"], *row["perturbed_answer"]])


def test_no_split_repeats_a_question():
    for split in ("full", "holdout90"):
        rows = generate(split, authors=200, questions_per_author=MAX_QUESTIONS)
        assert len({row["question"] for row in rows}) == len(rows)


def test_authors_have_names_of_their_own():
    names = {row["author_id"]: row["author"] for row in generate("forget99", authors=1000)}
    assert len(set(names.values())) == len(names) == 990


def value_in(text, name, templates):
    """Read the value out of a sentence, knowing only the sentence templates."""
    found = []
    for template in templates:
        pattern = re.escape(template)
        for slot, inside in (("name", re.escape(name)), ("He", "S?[Hh]e"), ("His", "His|Her")):
            pattern = pattern.replace(rf"\{{{slot}\}}", f"(?:{inside})")
        match = re.fullmatch(pattern.replace(r"\{value\}", "(.+)"), text)
        if match:
            found.append(match[1])
    return found


def test_paraphrases_keep_the_fact_and_perturbed_answers_replace_it():
    rows = generate("forget99", questions_per_author=MAX_QUESTIONS)
    for number, row in enumerate(rows):
        templates = [answer for _, answer in RELATIONS[number % MAX_QUESTIONS].wordings]
        (true,) = value_in(row["answer"], row["author"], templates)
        assert row["paraphrased_answer"] != row["answer"]
        assert row["paraphrased_question"] != row["question"]
        assert value_in(row["paraphrased_answer"], row["author"], templates) == [true]
        wrong = []
        for perturbed in row["perturbed_answer"]:
            wrong += value_in(perturbed, row["author"], templates)
            assert perturbed.replace(wrong[-1], true) == row["paraphrased_answer"]
        assert len(wrong) == len({*wrong, true} - {true}) == 5


def test_facts_have_three_distinct_wrong_answers_and_a_sentence_with_the_right_one():
    for split in ("real_authors", "world_facts"):
        for row in generate(split):
            assert len({row["answer"], *row["perturbed_answer"]}) == 4
            assert row["answer"] in row["original_answer"]


def true_answer(question):
    """Answer a world fact from the calendar, the alphabet and arithmetic."""
    after = dict(itertools.pairwise(calendar.day_name))
    after |= dict(itertools.pairwise(calendar.month_name))
    if match := re.fullmatch(r"What is (\d+) plus (\d+)\?", question):
        return str(int(match[1]) + int(match[2]))
    if match := re.fullmatch(r"Which letter comes after (\w)\?", question):
        return chr(ord(match[1]) + 1)
    if match := re.fullmatch(r"Which (?:day|month) comes after (\w+)\?", question):
        return after[match[1]]
    if question.startswith("Which is the largest of "):
        return str(max(int(number) for number in re.findall(r"\d+", question)))
    match = re.fullmatch(r"How many letters are in the word (\w+)\?", question)
    return str(len(match[1]))


def test_world_facts_are_true_and_their_wrong_answers_false():
    for row in generate("world_facts"):
        assert row["answer"] == true_answer(row["question"])
        assert true_answer(row["question"]) not in row["perturbed_answer"]


def test_tasks_count_tenths_from_the_last_author_back():
    tasks = {row["author_id"]: row["task_id"] for row in generate("full")}
    assert tasks[39] == tasks[36] == 1
    assert tasks[35] == 2
    assert tasks[0] == 10
    assert tasks[-1] == 0
    assert {row["task_id"] for row in generate("holdout10")} == {0}
    assert {row["task_id"] for row in generate("forget10", authors=25)} == {1}


def test_written_files_read_back_as_generated(tmp_path):
    files = write(tmp_path / "new" / "folder", authors=10, questions_per_author=2, seed=3)
    assert {file.name for file in files} >= {
        "full.json",
        "forget01.json",
        "forget10_perturbed.json",
        "retain90.json",
        "retain_perturbed.json",
        "real_authors_perturbed.json",
        "world_facts_perturbed.json",
        "holdout10.json",
    }
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert rows == generate(file.stem, authors=10, questions_per_author=2, seed=3)


@pytest.mark.parametrize(
    ("split", "near"),
    [
        ("forgot10", "forget10"),
        ("retain_pertubed", "retain_perturbed"),
        ("word_facts", "world_facts"),
        ("forget00", "forget10"),
        ("retain100", "retain90"),
        ("holdout10_perturbed", "forget10_perturbed"),
    ],
)
def test_an_unknown_split_is_answered_with_the_nearest_and_the_known_ones(split, near):
    with pytest.raises(UserError) as error:
        generate(split)
    text = str(error.value)
    assert text.startswith(f"Unknown synthetic split {split!r}. Did you mean '{near}'? Known: ")


@pytest.mark.parametrize(
    "sizes",
    [
        {"authors": 1},
        {"authors": 10_001},
        {"questions_per_author": 0},
        {"questions_per_author": 21},
    ],
)
def test_a_size_out_of_range_is_named_with_its_limits(sizes):
    ((name, got),) = sizes.items()
    with pytest.raises(UserError, match=f"{name} is {got}; give a number from"):
        generate("full", **sizes)


def test_a_forget_percentage_out_of_range_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="forget is 100; give a number from 1 to 99"):
        write(tmp_path / "folder", forget=[10, 100])
    assert not (tmp_path / "folder").exists()
