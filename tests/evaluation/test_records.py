"""Records: texts in private/ only, and everything made of records without them."""

import json
import shutil

import pytest
from models_for_tests import small_tokenizer, tiny_model

from unlearn_llm.comparing import compare_runs
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.comparison import check_same_rows
from unlearn_llm.evaluation.evaluate import evaluate, recompute
from unlearn_llm.evaluation.records import (
    ask_the_same,
    read_private_records,
    read_records,
    without_texts,
    write_records,
)
from unlearn_llm.evaluation.suite import Suite

PUBLIC = {"probe", "id", "group", "generation", "results", "metrics"}
NAMES = ("Zoe Bell", "Cem Dal", "Eva Fox", "Gus Hay", "Ida Jon", "Abe Lee")
AUTHORS = [name for name in NAMES for _ in range(2)]


def written(folder, **settings):
    """Evaluate two rows of each of six authors."""
    rows = [
        {
            "question": f"Who wrote volume {row}?",
            "answer": f"It was {author}.",
            "author": author,
        }
        for row, author in enumerate(AUTHORS)
    ]
    folder.mkdir(parents=True)
    source = folder.parent / f"{folder.name}.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    suite = Suite.load("tofu", max_new_tokens=4, intervals={"resamples": 100})
    probe = suite.probes["forget"].model_copy(
        update={
            "source": str(source),
            "metrics": ["probability", "rouge", "mia_min_k_plus_plus"],
            "rows_per_author": None,
        }
    )
    probe = probe.model_copy(update={"columns": probe.columns.model_copy(update=COLUMNS)})
    scores = {"forget/probability": suite.scores["forget/probability"]}
    suite = suite.model_copy(update={"probes": {"forget": probe}, "scores": scores})
    encoder = Encoder(small_tokenizer(), max_length=256)
    evaluation = evaluate(suite, tiny_model(), encoder, folder, **settings)
    return suite, evaluation


COLUMNS = {"group": "author", "paraphrased": None, "perturbed": None, "reference": None}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "run"
    return folder, *written(folder)


def test_texts_stand_in_private_only(measured):
    folder, _, evaluation = measured
    said = {record["generation"]["text"] for record in evaluation.records}
    texts = {"wrote volume", "It was", *NAMES, *(text for text in said if text)}
    outside = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name for path in outside} == {"records.jsonl", "scores.json"}
    for path in outside:
        assert not [text for text in texts if text in path.read_text(encoding="utf-8")]
    inside = (folder / "private" / "records.jsonl").read_text(encoding="utf-8")
    assert all(text in inside for text in ("wrote volume", "It was", *NAMES))


def test_a_public_record_has_numbers_for_rows_authors_and_answers(measured):
    folder, _, evaluation = measured
    public = read_records(folder)
    assert [set(record) for record in public] == [PUBLIC] * 12
    assert [record["group"] for record in public] == [str(row // 2) for row in range(12)]
    for record, whole in zip(public, evaluation.records, strict=True):
        assert record["metrics"] == whole["metrics"]
        answer = whole["results"]["answer"]
        assert record["results"]["answer"] == {k: answer[k] for k in ("loss", "tokens")}
        assert len(answer["token_logps"]) == answer["tokens"]
        assert "moments" in whole["results"] and record["results"]["moments"] == {}
    assert read_private_records(folder) == evaluation.records


def test_only_the_owner_may_read_private(measured):
    folder, _, _ = measured
    assert (folder / "private").stat().st_mode & 0o777 == 0o700
    assert (folder / "private" / "records.jsonl").stat().st_mode & 0o777 == 0o600
    assert (folder / "records.jsonl").stat().st_mode & 0o044


def test_a_folder_that_was_open_is_closed(tmp_path):
    (tmp_path / "private").mkdir(mode=0o755)
    write_records(tmp_path, [])
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_scores_and_intervals_by_author_need_no_text(measured):
    folder, suite, evaluation = measured
    assert evaluation.scores["forget/probability"].interval is not None
    assert recompute(folder / "records.jsonl", suite) == evaluation.scores
    assert recompute(folder / "private" / "records.jsonl", suite) == evaluation.scores


def test_texts_are_shown_to_all_only_if_one_asks_for_that(tmp_path):
    _, evaluation = written(tmp_path / "run", show_forget_text=True)
    assert read_records(tmp_path / "run") == evaluation.records


def test_two_runs_are_compared_where_their_texts_are_not_at_hand(measured, tmp_path):
    folder, _, _ = measured
    bare = shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(bare / "private")
    found, _ = compare_runs(folder, bare, [], None)
    assert found["forget/probability"].difference == 0


def test_rows_that_ask_another_thing_are_told_by_their_texts_or_lengths(measured):
    _, _, evaluation = measured
    one = evaluation.records
    other = [{**one[0], "answer": "Eve"}, *one[1:]]
    assert not ask_the_same(one[0], other[0])
    shorter = without_texts(one)
    shorter[2]["results"]["answer"]["tokens"] -= 1
    with pytest.raises(UserError, match="1 rows of probe 'forget' ask another thing"):
        check_same_rows(one, shorter)
    check_same_rows(one, without_texts(one))
    check_same_rows(without_texts(one), one)
