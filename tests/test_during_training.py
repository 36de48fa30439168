"""A suite at steps of a run, checkpoints and adapters evaluated afterwards, and the trade-off."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from models_for_tests import trained, weights
from test_cli import refused, unlearn, work  # noqa: F401  fixtures

from unlearn_llm import shared_base
from unlearn_llm.checkpoints import MANIFEST
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation import during
from unlearn_llm.evaluation.during import same_rows
from unlearn_llm.evaluation.evaluate import Evaluation, recompute
from unlearn_llm.evaluation.records import read_private_records
from unlearn_llm.evaluation.report import labels
from unlearn_llm.evaluation.suite import Suite, as_plain
from unlearn_llm.models import load_model

SMALL = ["limit=2", "max_new_tokens=4"]
RUN = [
    "train.gradient_accumulation_steps=2",
    "train.per_device_train_batch_size=1",
    "train.max_steps=4",
    "train.save_steps=2",
    "train.learning_rate=0.05",
    "train.logging_steps=1",
    "model.dtype=float32",
    "model.lora={r: 2, dropout: 0.5}",
    "evaluate.overrides={limit: 3, max_new_tokens: 4}",
]
TARGET_ROWS = ["split=forget05", "limit=3", "max_new_tokens=4"]
EVALUATED = [
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.eval_on_start=true",
    "evaluate.during={limit: 2}",
    "evaluate.reference=target_scores/records.jsonl",
    "evaluate.target=target_scores/records.jsonl",
]


POINTS = ["0", "2", "4", "target", "gold"]


@pytest.fixture(scope="module")
def runs(work, tmp_path_factory):  # noqa: F811
    """A folder with a target, its records, and one LoRA run with evaluations and one without."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("make_target.yaml", "forget.yaml"):
            shutil.copy(work / name, folder)
        command("finetune", "make_target.yaml")
        command("eval", "target", "--suite", "synthetic", *TARGET_ROWS)
        (folder / "outputs/evaluation/synthetic/target").rename(folder / "target_scores")
        command("train", "forget.yaml", *RUN, "train.output_dir=plain")
        command("train", "forget.yaml", *RUN, *EVALUATED, "train.output_dir=run")
    return folder


def command(*arguments: str) -> None:
    from unlearn_llm.cli import app

    app(list(arguments), standalone_mode=False)


@pytest.fixture
def inside(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def rows_of(table):
    return list(csv.DictReader(table.read_text().splitlines()))


def scores_in(path):
    return json.loads((path / "scores.json").read_text())["scores"]


# During training.


def test_a_run_with_evaluations_is_the_run_without_bitwise(runs):
    for name in ("checkpoint-2", "checkpoint-4", "."):
        files = [runs / run / name / "adapter_model.safetensors" for run in ("plain", "run")]
        assert files[0].read_bytes() == files[1].read_bytes()
    states = [
        json.loads((runs / run / "trainer_state.json").read_text()) for run in ("plain", "run")
    ]
    logs = [
        [line for line in state["log_history"] if "forget/loss" in line or "retain/loss" in line]
        for state in states
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    ends = [runs / run / "evaluation" / "records.jsonl" for run in ("plain", "run")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_scores_by_step_are_logged_and_kept_without_texts(runs):
    folder = runs / "run" / "evaluation"
    assert {path.name for path in folder.glob("step-*")} == {"step-0", "step-2", "step-4"}
    logged = {
        line["step"]: line
        for line in json.loads((runs / "run" / "trainer_state.json").read_text())["log_history"]
        if "eval_UFE_proxy" in line
    }
    texts = [record["question"] for record in read_private_records(folder)]
    for step in (0, 2, 4):
        assert [path.name for path in (folder / f"step-{step}").iterdir()] == ["scores.json"]
        details = json.loads((folder / f"step-{step}" / "scores.json").read_text())
        assert details["suite"]["limit"] == 2
        for name, score in details["scores"].items():
            assert logged[step].get(f"eval_{name}") == score["value"]
        assert not any(text in json.dumps(details) for text in texts)
    assert scores_in(folder / "step-0") != scores_in(folder / "step-4")


def test_the_last_step_has_the_scores_of_the_end_on_its_rows(runs):
    folder = runs / "run" / "evaluation"
    kept = [
        record for record in read_private_records(folder) if record["id"] in ids_of_step(folder)
    ]
    first = runs / "first_rows.jsonl"
    first.write_text("".join(json.dumps(record) + "\n" for record in kept))
    suite = Suite.load("synthetic", split="forget05", limit=2)
    again = recompute(first, suite)
    found = scores_in(folder / "step-4")
    for name in ("UFE_proxy", "forget/probability", "retain/token_entropy"):
        assert found[name]["value"] == pytest.approx(again[name].value, abs=1e-6)


def ids_of_step(folder):
    """The first two rows of each probe; all probes number their rows alike."""
    ids = sorted(
        {record["id"] for record in read_private_records(folder) if record["probe"] == "forget"}
    )
    return ids[:2]


def test_the_marks_are_other_models_on_the_rows_of_the_steps(runs):
    # The target is step 0; given as the gold model's records, it must come out the same.
    folder = runs / "run" / "evaluation"
    gold, start = scores_in(folder / "gold"), scores_in(folder / "step-0")
    assert gold["UFE_proxy"]["n"] == start["UFE_proxy"]["n"]
    for name in ("UFE_proxy", "forget/probability", "retain/token_entropy"):
        assert gold[name]["value"] == pytest.approx(start[name]["value"], abs=1e-6)


def test_records_of_other_rows_make_no_mark(runs):
    suite = Suite.load("synthetic", split="forget05", limit=2)
    records = read_private_records(runs / "target_scores")
    details = {"judges": {"entailment": None}, "suite": as_plain(suite.with_proxies())}
    of_run = Evaluation({}, {**details, "judges": {}}, records)
    same_rows(of_run, runs / "target_scores")
    moved = [*records[1:], {**records[0], "question": "Another split's row 0?"}]
    with pytest.raises(UserError, match=f"lacks 1 of the {len(records)} rows"):
        same_rows(Evaluation({}, of_run.details, moved), runs / "target_scores")
    with pytest.raises(UserError, match="was read by other judges"):
        same_rows(Evaluation({}, details, records), runs / "target_scores")


def test_the_table_holds_every_point(runs):
    rows = rows_of(runs / "run" / "evaluation" / "trade_off.csv")
    assert [row["point"] for row in rows] == POINTS
    expected = scores_in(runs / "run" / "evaluation" / "step-2")["UFE_proxy"]["value"]
    assert float(rows[1]["UFE_proxy"]) == expected


def test_drawing_numbers_and_switching_modes_disturbs_nothing(tmp_path):
    import random

    import numpy as np

    def disturb(model):
        model.eval()
        return {"x": float(torch.rand(1) + random.random() + np.random.rand())}

    def run(name, **settings):
        model = tiny_with_dropout()
        return weights(trained(tmp_path / name, model, max_steps=3, **settings).model)

    evaluated = run("evaluated", eval_strategy="steps", eval_steps=1, eval_on_start=True,
                    gradient_accumulation_steps=2, given={"evaluate_model": disturb})  # fmt: skip
    plain = run("plain", gradient_accumulation_steps=2)
    assert torch.equal(plain, evaluated)
    assert not torch.equal(plain, run("other", gradient_accumulation_steps=2, seed=1))


def tiny_with_dropout():
    from models_for_tests import tiny_model

    from unlearn_llm.models import LoraSettings, add_lora

    torch.manual_seed(1)
    return add_lora(tiny_model(), LoraSettings(r=4, dropout=0.5))


def test_a_resumed_run_completes_the_curve(inside, unlearn):  # noqa: F811
    shutil.copytree("run", "whole")
    for gone in ("checkpoint-4", "evaluation/step-4"):
        shutil.rmtree(inside / "run" / gone)
    (inside / "run" / "evaluation" / "trade_off.csv").unlink()
    (inside / "run" / MANIFEST).unlink()  # as a run that was killed before it saved its model
    given = ["train", "forget.yaml", *RUN, *EVALUATED, "train.output_dir=run", "--resume"]
    refused(unlearn(*given, "evaluate.during={limit: 1}"), "unlike suite.limit: 2 and 1")
    done = unlearn(*given)
    assert done.code == 0, done.err
    for name in ("evaluation/trade_off.csv", "adapter_model.safetensors"):
        files = [inside / run / name for run in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["evaluate.during={limit: 2}"], ["evaluate.during", "no step is evaluated"]),
        (["evaluate.target=x.jsonl"], ["evaluate.target", "no step is evaluated"]),
        (["train.eval_on_start=true", "evaluate=null"], ["train.eval_on_start", "needs an eval"]),
        (["train.eval_strategy=steps", "evaluate.during={limt: 2}"], ["Did you mean 'limit'?"]),
        (["train.eval_strategy=steps", "evaluate.target=x.jsonl"], ["There is no file x.jsonl"]),
    ],
)
def test_settings_that_nobody_reads_are_refused(inside, unlearn, given, words):  # noqa: F811
    refused(unlearn("train", "forget.yaml", "train.output_dir=no", *given), *words)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_and_train_as_without(inside):
    def torchrun(*arguments: str) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        given = ["-m", "unlearn_llm", "train", "forget.yaml", *RUN, *arguments]
        done = subprocess.run(
            [sys.executable, *launch, *given, "train.gradient_accumulation_steps=1"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    torchrun("train.output_dir=plain_two")
    torchrun("train.output_dir=run_two", *EVALUATED)
    files = [inside / run / "adapter_model.safetensors" for run in ("plain_two", "run_two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    folders = [inside / run / "evaluation" for run in ("run", "run_two")]
    assert [row["point"] for row in rows_of(folders[1] / "trade_off.csv")] == POINTS
    one, two = (scores_in(folder / "step-0") for folder in folders)
    for name, score in one.items():
        assert two[name]["value"] == pytest.approx(score["value"], abs=1e-6), name


# Checkpoints and adapters side by side.


def test_adapters_share_a_base_and_score_as_alone(inside, unlearn, monkeypatch):  # noqa: F811
    bare = inside / "bare" / "checkpoint-2"  # as an interrupted copy leaves it
    shutil.copytree("run", "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    names = ["run/checkpoint-2", "target", "run/checkpoint-4", "run", "bare/checkpoint-2"]
    loaded = []
    monkeypatch.setattr(
        shared_base, "load_model", lambda settings: loaded.append(1) or load_model(settings)
    )
    given = ["--suite", "synthetic", *SMALL, "model.dtype=float32"]
    together = unlearn("eval", *names, *given, "--output", "together", "--json")
    assert together.code == 0, together.err
    rows = json.loads(together.out)
    assert list(rows) == names
    assert len(loaded) == 1
    for name in names[:3]:
        alone = unlearn("eval", name, *given, "--output", "alone", "--json")
        assert json.loads(alone.out)[name] == rows[name]
        of_both = [
            inside / f / "synthetic" / name.replace("/", "--") for f in ("together", "alone")
        ]
        files = [(folder / "records.jsonl").read_bytes() for folder in of_both]
        assert files[0] == files[1]
    # A checkpoint is measured as its run measures itself.
    assert rows["run/checkpoint-4"] == rows["run"] != rows["run/checkpoint-2"]
    assert rows["bare/checkpoint-2"] == rows["run/checkpoint-2"]


def test_a_table_names_folders_so_that_they_are_told_apart():
    assert labels(["a/run", "b/target"]) == {"a/run": "run", "b/target": "target"}
    two = ["x/a/checkpoint-30", "x/b/checkpoint-30", "x/b"]
    assert list(labels(two).values()) == ["a/checkpoint-30", "b/checkpoint-30", "b"]
    assert labels(["run"]) == {"run": "run"}


# unlearn plot.


def test_plot_overlays_runs(inside, unlearn):  # noqa: F811
    pytest.importorskip("matplotlib")
    shutil.copytree("run", "again")
    done = unlearn("plot", "run", "again", "--output", "both.svg")
    assert (done.code, done.out) == (0, "wrote both.csv\nwrote both.svg\n")
    rows = rows_of(inside / "both.csv")
    assert [row["run"] for row in rows] == ["run"] * 5 + ["again"] * 5
    drawn = (inside / "both.svg").read_text()
    assert all(text in drawn for text in (">run<", ">again<", ">gold<", "UFE_proxy x 100"))
    assert {"trade_off.svg", "trade_off.png"} <= {
        p.name for p in (inside / "run/evaluation").iterdir()
    }


def test_without_matplotlib_the_table_is_written_and_one_line_says_more(
    inside,
    unlearn,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = unlearn("plot", "run", "--output", "alone.svg")
    assert (done.code, done.out) == (2, "wrote alone.csv\n")
    assert "pip install 'unlearn_llm[report]'" in done.err
    assert len(rows_of(inside / "alone.csv")) == 5
    said = []
    monkeypatch.setattr(during.logger, "warning", said.append)
    suite = Suite.load("synthetic")
    during.DuringTraining(inside / "run" / "evaluation", suite, None).finish()
    assert len(said) == 1 and "trade_off.csv is written, but no figure: trade_off.svg" in said[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plain"], ["holds no step-N/scores.json", "train.eval_strategy=steps"]),
        (["run", "--output", "x.txt"], [".svg, .png, .pdf"]),
        (["run", "--x", "utility"], ["no score 'utility'"]),
        (["run", "--y", "ks_statistic"], ["ks_statistic was not measured in every step: "]),
    ],
)
def test_what_cannot_be_drawn_is_one_line(inside, unlearn, arguments, words):  # noqa: F811
    refused(unlearn("plot", *arguments), *words)


def test_runs_measured_otherwise_are_not_drawn_together(inside, unlearn):  # noqa: F811
    shutil.copytree("run", "other")
    for file in (inside / "other" / "evaluation").glob("*/scores.json"):
        file.write_text(file.read_text().replace('"limit": 2', '"limit": 1'))
    refused(unlearn("plot", "run", "other"), "run and other", "unlike suite.limit: 2 and 1")


def test_a_leaderboard_takes_the_end_of_a_run_only(inside, unlearn):  # noqa: F811
    shown = unlearn("leaderboard", "run", "--no-published")
    assert shown.code == 0 and shown.err == ""
