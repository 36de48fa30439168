"""Tasks of lm-eval on the command line: our suites written as such, and theirs asked for."""

import importlib.util
import json

import pytest
from models_for_tests import small_tokenizer, tiny_model
from typer.testing import CliRunner

from unlearn_llm import cli
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.suite import Suite

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stand in a folder with a model and rows in the form of GSM8K."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    small_tokenizer().save_pretrained("model")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    row = {"question": "What is one and one?", "answer": "It is two.\n#### 2"}
    for split in ("train", "test"):
        file = tmp_path / "data" / "gsm8k" / f"{split}.jsonl"
        file.write_text((json.dumps(row) + "\n") * 6)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli.app, [*arguments], catch_exceptions=False)


@needs_lm_eval
def test_a_task_is_measured_beside_the_others(folder):
    done = run("eval", "model", "--suite", "downstream", "tasks=[gsm8k]", "folder=data", "limit=2",
               "--json")  # fmt: skip
    assert done.exit_code == 0
    scores = json.loads((folder / "outputs/evaluation/downstream/model/scores.json").read_text())
    assert scores["scores"]["GSM8K"]["shots"] == 5 and scores["scores"]["GSM8K"]["n"] == 2
    again = run("eval", "--from", "outputs/evaluation/downstream/model", "--json")
    (of_model,) = json.loads(again.stdout).values()
    assert of_model["GSM8K"]["value"] == scores["scores"]["GSM8K"]["value"]
    assert set(of_model) == {"GSM8K", "GSM8K/strict"}


def test_a_suite_is_written_as_tasks_and_never_over_files(folder):
    done = run("export-tasks", "model", "tasks", "--suite", "synthetic", "limit=2",
               "data.template=plain")  # fmt: skip
    assert done.exit_code == 0 and "--include_path tasks" in done.stdout
    group = (folder / "tasks" / "synthetic.yaml").read_text()
    for probe in Suite.load("synthetic").probes:
        assert f"- synthetic_{probe}_likelihood" in group
        rows = (folder / "tasks" / f"synthetic_{probe}_generation.jsonl").read_text()
        assert len(rows.splitlines()) == 2
    with pytest.raises(UserError, match="not empty"):
        run("export-tasks", "model", "tasks", "--suite", "synthetic", "data.template=plain")


def test_another_judge_leaves_the_others():
    suite = Suite.load("safety", judges={"choice": "mine"})
    assert suite.judges["choice"] == "mine"
    assert suite.judges["harmfulness"] == Suite.load("safety").judges["harmfulness"]
