"""The benchmark of two requests: its sets, and how its table is made."""

import json

import pytest
import requests_twice

from unlearn_llm.rows import load_rows


def questions(file):
    return {row["question"] for row in load_rows(str(file))}


def test_the_second_request_retains_the_first_ones_rows_and_asks_for_others(tmp_path):
    requests_twice.write_sets(tmp_path)
    first, second = (questions(tmp_path / f"{name}.jsonl") for name in ("first", "second"))
    retained = questions(tmp_path / "all_but_second.jsonl")
    assert first and second and not first & second
    assert first < retained and not second & retained
    assert questions(tmp_path / "all_but_first.jsonl") == retained - first | second


def test_the_table_shows_mean_and_range_over_seeds(tmp_path):
    for seed, value in ((0, 0.25), (1, 0.75)):
        for stage in requests_twice.STAGES:
            folder = tmp_path / f"seed-{seed}" / stage / "evaluation"
            folder.mkdir(parents=True)
            scores = {name: {"value": value} for name in requests_twice.SCORES}
            (folder / "scores.json").write_text(json.dumps({"scores": scores}))
    head, _, *lines = requests_twice.table(tmp_path, [0, 1]).splitlines()
    assert head.count("|") == 5 and len(lines) == 4
    assert all(line.count("0.500 (0.250 to 0.750)") == 3 for line in lines)


def test_a_missing_run_is_no_row(tmp_path):
    with pytest.raises(FileNotFoundError):
        requests_twice.table(tmp_path, [0])
