"""A suite from end to end: a tiny random model, three rows per probe, files on disk."""

import io
import json
import math

import pytest
from models_for_tests import small_tokenizer, tiny_model
from rich.console import Console

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation import evaluate as evaluate_module
from unlearn_llm.evaluation.evaluate import evaluate, recompute
from unlearn_llm.evaluation.records import read_private_records, read_records, write_whole
from unlearn_llm.evaluation.report import read_details, shown, side_by_side, table
from unlearn_llm.evaluation.suite import Suite

SMALL = {"limit": 3, "max_new_tokens": 8}


def run(folder, suite=None, seed=0, **keywords):
    suite = suite or Suite.load("synthetic", **SMALL)
    encoder = Encoder(small_tokenizer(), max_length=256)
    return evaluate(suite, tiny_model(seed=seed), encoder, folder, **keywords)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def first(folder):
    return run(folder)


def judged_suite(**overrides):
    """The synthetic suite, with the judges' metrics in place of the proxies."""
    judges = {"entailment": "absent/judge", "similarity": "absent/judge"}
    return Suite.load("synthetic", **{**SMALL, "proxies": False, "judges": judges, **overrides})


class EveryoneAgrees:
    """A judge for the tests: says yes, and notes what it was asked."""

    def __init__(self, kind):
        self.name = "yes"
        self.kind = kind
        self.asked = []

    def __call__(self, pairs):
        self.asked += pairs
        return ["entailment" if self.kind == "entailment" else 0.5] * len(pairs)


@pytest.fixture
def agreeing():
    return {kind: EveryoneAgrees(kind) for kind in ("entailment", "similarity")}


def test_records_hold_one_row_per_probe_and_sample(first, folder):
    records = read_private_records(folder)
    assert records == first.records
    assert [(r["probe"], r["id"]) for r in records] == [
        (probe, str(row))
        for probe in ("forget", "retain", "real_authors", "world_facts")
        for row in range(3)
    ]


def test_a_record_holds_what_was_asked_and_what_came_back(first):
    record = first.records[0]
    answer = record["results"]["answer"]
    assert answer["tokens"] == len(answer["token_logps"])
    assert answer["loss"] == pytest.approx(-sum(answer["token_logps"]) / answer["tokens"])
    assert record["metrics"]["probability"] == pytest.approx(math.exp(-answer["loss"]))
    assert set(record["results"]) == {
        "answer",
        "paraphrased",
        *(f"perturbed/{index}" for index in range(5)),
    }
    assert isinstance(record["generation"]["text"], str)


def test_files_are_strict_json(first, folder):
    def refuse(constant):
        raise AssertionError(constant)

    for name in ("records.jsonl", "private/records.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=refuse)
    json.loads((folder / "scores.json").read_text(encoding="utf-8"), parse_constant=refuse)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["private", "records.jsonl", "scores.json"]


def test_scores_json_says_how_the_scores_were_made(first, folder):
    details = read_details(folder)
    assert details["scores"]["MU9"]["value"] == first.scores["MU9"].value
    assert details["suite"]["split"] == "forget10" and details["suite"]["proxies"]
    assert details["versions"].keys() >= {"unlearn_llm", "torch", "transformers", "rouge-score"}
    assert details["requests"] == {"scored": 12 * 1 + 6 * 6 + 6 * 3, "generated": 12}
    assert details["model"]["type"] == "llama" and len(details["model"]["fingerprint"]) == 16
    assert details["probes"]["forget"]["notes"] == ["first 3 of 40 rows"]


def test_scores_of_proxies_are_named_so(first):
    assert {"UFE_proxy", "TFE_proxy", "MU18_proxy", "OVR_proxy", "MU9"} <= set(first.scores)
    assert "UFE" not in first.scores and "similarity" in first.scores["UFE_proxy"].note


def test_scores_can_be_recomputed_from_the_records(first, folder):
    assert recompute(folder, Suite.load("synthetic", **SMALL)) == first.scores


def test_forget_quality_without_a_reference_is_not_measured(first):
    score = first.scores["forget_quality"]
    assert score.value is None and "no reference" in score.note


def test_forget_quality_compares_with_another_runs_records(first, folder, tmp_path):
    same = run(tmp_path, reference_records=folder / "records.jsonl")
    assert same.scores["forget_quality"].value == pytest.approx(1.0)
    other = run(None, seed=1, reference_records=folder)
    assert other.scores["ks_statistic"].value > 0


def test_a_reference_with_other_rows_gives_a_reason(first, folder):
    suite = Suite.load("synthetic", limit=2, max_new_tokens=8, reference=str(folder))
    score = run(None, suite).scores["forget_quality"]
    assert score.value is None and "other rows" in score.note


def test_a_reference_that_is_not_there_is_an_error_before_the_model_is_asked(monkeypatch):
    monkeypatch.setattr(evaluate_module, "Runner", None)
    with pytest.raises(UserError, match="There is no file"):
        run(None, reference_records="nowhere/records.jsonl")


def test_scores_whose_judge_cannot_be_loaded_are_not_measured(tmp_path):
    evaluation = run(tmp_path, judged_suite())
    for name in ("TFE [judge]", "MU18 [judge]", "OVR [judge]", "forget/similarity [judge]"):
        score = evaluation.scores[name]
        assert score.value is None and "could not be loaded" in score.note
    assert evaluation.scores["MU9"].value is not None
    assert evaluation.records[0]["metrics"]["similarity"] is None
    again = recompute(tmp_path, judged_suite(), not_measured=evaluation.details["not_measured"])
    assert again == evaluation.scores


def test_scores_without_a_named_judge_are_not_measured():
    evaluation = run(None, Suite.load("synthetic", proxies=False, **SMALL))
    assert evaluation.scores["TFE"].value is None
    assert "names no entailment judge" in evaluation.scores["TFE"].note


def test_judges_are_asked_once_per_pair_and_named(agreeing):
    evaluation = run(None, judged_suite(), judges=agreeing)
    pairs = agreeing["similarity"].asked
    assert pairs and len(pairs) == len(set(pairs))
    assert evaluation.scores["forget/similarity [yes]"].value == 0.5
    assert evaluation.details["judges"]["similarity"] == "yes"


def test_the_papers_judges_are_not_in_the_names(agreeing):
    for kind, source in Suite.load("tofu").judges.items():
        agreeing[kind].name = source
    evaluation = run(None, judged_suite(), judges=agreeing)
    assert evaluation.scores["forget/similarity"].value == 0.5


def test_a_row_that_cannot_be_encoded_is_named_with_its_probe(tmp_path):
    rows = [{"question": "Who?", "answer": text} for text in ("She.", "a long answer " * 99)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    probe = {"source": str(tmp_path / "rows.json"), "metrics": ["probability"]}
    suite = Suite(name="x", probes={"mine": probe}, scores={})
    with pytest.raises(UserError, match=r"Probe 'mine', row 1; the first: .*max_length"):
        run(None, suite)


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    write_whole(path, "old")

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_record_is_named_by_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"probe": "a", "id": "0", "metrics": {}}\n{"torn', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: not a record"):
        read_records(path)


def test_the_table_shows_models_in_rows_and_scores_in_columns(first):
    rows = side_by_side({"ours": first.details}, ["UFE_proxy", "forget_quality", "absent"])
    assert rows["ours"]["UFE_proxy"]["text"] == f"{100 * first.scores['UFE_proxy'].value:.2f}"
    assert rows["ours"]["forget_quality"]["text"] == "not measured"
    assert rows["ours"]["absent"]["note"] == "not in this suite"
    made = table({"ours": first.details, "theirs": first.details}, ["MU9", "forget/rouge"])
    assert made.row_count == 2
    assert [str(column.header) for column in made.columns] == ["model", "MU9", "forget/rouge"]


def test_a_narrow_table_cuts_no_name(first):
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(table({"ours": first.details}, ["UFE_proxy", "TFE_proxy", "MU18_proxy", "MU9"]))
    assert "…" not in console.export_text()


def test_scores_are_written_as_the_papers_write_them():
    assert shown(0.73689, "ufe") == "73.69"
    assert shown(1.834066e-21, "forget_quality") == "1.83e-21"
    assert shown(0.5, "mean") == "0.5000"
    assert shown(None, "ufe") == "not measured"
