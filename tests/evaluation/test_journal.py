"""Answers on disk: whole lines or nothing, of one model and one set of questions only."""

import json
import logging

import pytest

from unlearn_llm.evaluation.journal import Journal, key_of, read_journal, remove_journal
from unlearn_llm.evaluation.requests import Generate, Generation, LogProb, LogProbResult
from unlearn_llm.private import PRIVATE

ORIGIN = {"fingerprint": "abc", "template": "plain", "batches": (1, 2)}
SCORED = (LogProb("A secret?", "yes"), LogProbResult((-0.1, -1 / 3, float("-inf")), (True, False)))
SAID = (Generate("A secret?"), Generation("so it is", ("so", "Ġit"), False))


@pytest.fixture
def folder(tmp_path):
    """A folder with a journal of two batches."""
    journal = Journal(tmp_path, ORIGIN, {})
    journal.add([SCORED])
    journal.add([SAID])
    return tmp_path


def test_answers_come_back_as_they_were(folder):
    answers = read_journal(folder, ORIGIN)
    assert Journal(folder, ORIGIN, answers).known([SCORED[0], SAID[0], Generate("new?")]) == dict(
        [SCORED, SAID]
    )


def test_questions_are_not_in_the_file(folder):
    (path,) = (folder / PRIVATE).iterdir()
    assert "secret" not in path.read_text(encoding="utf-8")


def test_only_its_owner_reads_what_the_model_said(folder):
    (path,) = (folder / PRIVATE).iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_requests_of_unlike_kinds_or_texts_have_unlike_keys():
    requests = [LogProb("a", "b"), LogProb("ab", ""), LogProb("b", "a"), Generate("a")]
    assert len({key_of(request) for request in requests}) == 4
    assert key_of(LogProb("a", "b")) == key_of(LogProb("a", "b"))


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_torn_line_is_cut_off_and_only_that(folder, lost):
    (path,) = (folder / PRIVATE).iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert read_journal(folder, ORIGIN) == {key_of(SCORED[0]): SCORED[1]}
    Journal(folder, ORIGIN, {}).add([SAID])
    assert path.read_bytes() == whole


def test_what_follows_a_damaged_line_is_cut_off(folder):
    (path,) = (folder / PRIVATE).iterdir()
    header, first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b"\0" * len(first) + b"\n" + second)
    assert read_journal(folder, ORIGIN) == {}
    assert path.read_bytes() == header


def test_a_journal_that_was_torn_in_its_first_line_begins_anew(folder):
    (path,) = (folder / PRIVATE).iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    assert read_journal(folder, ORIGIN) == {}
    journal = Journal(folder, ORIGIN, {})
    journal.add([SCORED])
    journal.add([SAID])
    assert path.read_bytes() == whole


def test_answers_of_another_origin_are_removed_with_a_message(folder, caplog):
    (folder / "records.jsonl").write_text("stays")
    with caplog.at_level(logging.WARNING):
        assert read_journal(folder, {**ORIGIN, "template": "phi"}) == {}
    assert "differs in template." in caplog.text
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["records.jsonl"]


def test_all_processes_files_are_read(folder):
    other = (Generate("another?"), Generation("", (), True))
    Journal(folder, ORIGIN, {}, process=1).add([other])
    answers = read_journal(folder, ORIGIN)
    assert len(answers) == 3 and answers[key_of(other[0])] == other[1]
    remove_journal(folder)
    assert not any(path.is_file() for path in folder.rglob("*"))


def test_a_line_is_json_that_other_programs_could_read(folder):
    (path,) = (folder / PRIVATE).iterdir()
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(header)["fingerprint"] == "abc"
    assert [len(json.loads(line)) for line in lines] == [1, 1]
