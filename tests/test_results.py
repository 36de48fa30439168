"""A run goes on wherever it was killed: before, during and after its last checkpoint."""

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest

from unlearn_llm import cli, pipeline, results
from unlearn_llm.checkpoints import MANIFEST, STAGING, fault
from unlearn_llm.errors import Preempted, UserError, WriteError
from unlearn_llm.pipeline import run_finetune, run_train
from unlearn_llm.recipe import Recipe

TARGET = """
kind: finetune
model: {new: {family: llama, hidden_size: 16, layers: 1, heads: 2, vocabulary: 300, context: 128}}
data: {train: [synthetic/forget05], template: plain, max_length: 128}
train: {output_dir: target, max_steps: 2, use_cpu: true, learning_rate: 1e-3}
"""
UNLEARN = """
kind: unlearn
model: {path: target, dtype: bfloat16}
data: {forget: synthetic/forget05, retain: synthetic/retain_perturbed, template: plain,
       max_length: 128}
train: {output_dir: unlearned, objective: npo+gd, max_steps: 3, per_device_train_batch_size: 2,
        schedule_parameters: {forget: 1, retain: 1}, use_cpu: true, save_steps: 2,
        save_strategy: steps, logging_steps: 1, learning_rate: 1e-3, optimizer: dual_adamw}
evaluate: {suite: synthetic, overrides: {limit: 2, max_new_tokens: 4}}
"""
LORA = ["model.lora={r: 4, dropout: 0.1}"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a target, an undisturbed run and one of an adapter."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("work")
        patched.chdir(folder)
        Path("target.yaml").write_text(TARGET)
        Path("forget.yaml").write_text(UNLEARN)
        run_finetune(Recipe.load("target.yaml"))
        run_train(recipe("whole"))
        run_train(recipe("whole_lora", *LORA))
        yield folder


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def recipe(output, *overrides) -> Recipe:
    return Recipe.load("forget.yaml", [f"train.output_dir={output}", *overrides])


def assert_same(output: str, whole: str = "whole") -> None:
    """Weights and records to the byte, log lines but for the times."""
    (weights,) = Path(whole).glob("*.safetensors")
    for name in (weights.name, "evaluation/records.jsonl", "config.json", "tokenizer.json"):
        if (Path(whole) / name).exists():
            assert (Path(output) / name).read_bytes() == (Path(whole) / name).read_bytes(), name
    ours, theirs = (
        json.loads((Path(run) / "trainer_state.json").read_text())["log_history"]
        for run in (output, whole)
    )
    assert ours[:-1] == theirs[:-1] and len(ours) == 4
    assert fault(Path(output)) is None
    assert not (Path(output) / STAGING).exists()


def raise_interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


def killed_in(monkeypatch, owner, name, output, *overrides, resume=False) -> None:
    """Run until a function is called."""
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_train(recipe(output, *overrides), resume=resume)


def test_where_nothing_was_begun_a_resumed_run_starts_anew_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        run_train(recipe("anew"), resume=True)
    assert "anew holds no checkpoint yet: the run starts anew." in caplog.text
    assert_same("anew")


@pytest.mark.parametrize(
    ("overrides", "whole"), [([], "whole"), (LORA, "whole_lora")], ids=["full", "lora"]
)
def test_a_run_that_is_killed_at_every_stage_is_the_undisturbed_run(
    monkeypatch, caplog, overrides, whole
):
    output = f"stages_{whole}"
    killed_in(monkeypatch, pipeline, "load_model", output, *overrides)
    killed_in(monkeypatch, pipeline, "save_model", output, *overrides, resume=True)
    assert (Path(output) / "checkpoint-2").is_dir() and not (Path(output) / MANIFEST).exists()
    killed_in(monkeypatch, results, "commit_files", output, *overrides, resume=True)
    (Path(output) / ".recipe.yaml.0a1b2c3d").write_text("kind:")  # as `write_whole` leaves it
    killed_in(monkeypatch, pipeline, "evaluate", output, *overrides, resume=True)
    assert (Path(output) / MANIFEST).exists()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run = run_train(recipe(output, *overrides), resume=True)
    assert "is trained: only the evaluation is left." in caplog.text
    assert len(run.log) == 4 and run.evaluation.scores
    assert not list(Path(output).glob(".*"))
    assert_same(output, whole)


def test_a_finetuning_run_goes_on_in_and_between_epochs(monkeypatch):
    def finetuning(output):  # epochs of three steps
        settings = [f"train.output_dir={output}", "train.max_steps=8", "train.save_steps=1"]
        return Recipe.load("target.yaml", [*settings, "train.save_strategy=steps"])

    run_finetune(finetuning("whole_target"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "_finish", raise_interrupt)
        run_finetune(finetuning("target_again"))
    for newest in (7, 3, 5):  # in the third epoch, after the first one, in the second one
        for step in range(newest + 1, 9):
            shutil.rmtree(f"target_again/checkpoint-{step}")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(pipeline, "_finish", raise_interrupt)
            run_finetune(finetuning("target_again"), resume=True)
        weights = [
            Path(run, "checkpoint-8", "model.safetensors").read_bytes()
            for run in ("whole_target", "target_again")
        ]
        assert weights[0] == weights[1], newest


def test_a_finished_run_says_so_and_gives_its_results_again(monkeypatch, caplog):
    def load_model(settings):
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(pipeline, "load_model", load_model)
    with caplog.at_level(logging.WARNING):
        run = run_train(recipe("whole"), resume=True)
    assert "whole is finished: nothing is left to do." in caplog.text
    details = json.loads(Path("whole/evaluation/scores.json").read_text())
    assert run.evaluation.details == details
    assert {name: score.value for name, score in run.evaluation.scores.items()} == {
        name: score["value"] for name, score in details["scores"].items()
    }


def test_a_damaged_model_is_made_again_from_the_last_checkpoint(caplog):
    run_train(recipe("damaged"))
    file = Path("damaged/model.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        run_train(recipe("damaged"), resume=True)
    assert "The model in damaged is damaged: model.safetensors has" in caplog.text
    assert "Going on from damaged/checkpoint-3." in caplog.text
    assert_same("damaged")


def test_a_finished_run_that_is_to_be_measured_otherwise_is_measured_anew():
    run_train(recipe("measured"))
    again = run_train(recipe("measured", "evaluate.overrides={limit: 3}"), resume=True)
    assert again.evaluation.details["probes"]["forget"]["rows"] == 3
    assert len(again.evaluation.records) > len(
        Path("whole/evaluation/records.jsonl").read_text().splitlines()
    )


def test_a_folder_of_something_else_is_not_gone_on_with(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds no recipe\.yaml, so it is no run to go on with"):
        run_train(recipe(tmp_path), resume=True)


def test_a_full_disk_at_the_final_save_keeps_the_checkpoints(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(results, "commit_files", full)
        with pytest.raises(WriteError, match=r"could not be saved in full: .*No space left"):
            run_train(recipe("full"))
    run_train(recipe("full"), resume=True)
    assert_same("full")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WriteError("x"), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (Preempted("x"), 143),
    ],
)
def test_the_exit_code_says_what_happened(monkeypatch, capsys, error, code):
    def command(**keywords):
        raise error

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert capsys.readouterr().err.count("\n") == 1
