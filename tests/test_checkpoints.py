"""Checkpoints are whole or not there: damage, kills at every step of a save, full disks."""

import errno
import json
import logging
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models_for_tests import make_trainer, trained, weights

from unlearn_llm import checkpoints
from unlearn_llm.checkpoints import MANIFEST, STAGING, commit, commit_files, fault, newest, rotate
from unlearn_llm.errors import UserError, WriteError

SAVING = {"save_strategy": "steps", "save_steps": 2, "optimizer": "dual_adamw_plus"}


class Killed(BaseException):
    pass


def staged(folder: Path, name: str, text: str = "weights") -> Path:
    made = folder / STAGING / name
    (made / "inner").mkdir(parents=True)
    (made / "model").write_text(text)
    (made / "inner" / "state").write_text("state")
    return made


def committed(folder: Path, step: int, text: str = "weights") -> Path:
    final = folder / f"checkpoint-{step}"
    commit(staged(folder, final.name, text), final)
    return final


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# Manifests.


@pytest.mark.parametrize("name", ["model", "inner/state", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_every_damage_of_every_file_is_found(tmp_path, name, damage):
    checkpoint = committed(tmp_path, 3)
    assert fault(checkpoint) is None
    file = checkpoint / name
    if damage == "flip":
        flip(file)
    elif damage == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -1])
    if (name, damage) == (MANIFEST, "truncate"):
        assert json.loads(file.read_text())  # only its last line end: nothing is lost
    else:
        assert name in fault(checkpoint) or MANIFEST in fault(checkpoint)


def test_the_newest_good_checkpoint_is_used_and_the_damaged_ones_are_named(tmp_path, caplog):
    for step in (9, 10, 11):
        committed(tmp_path, step)
    flip(tmp_path / "checkpoint-11" / "model")
    (tmp_path / "checkpoint-10" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == tmp_path / "checkpoint-9"
    first, second = (record.getMessage() for record in caplog.records)
    assert "checkpoint-11 is damaged: model is not what was saved" in first
    assert "checkpoint-10 is damaged: it has no unlearn_manifest.json" in second
    assert newest(tmp_path / "nowhere") is None


def test_the_oldest_go_and_the_best_stays(tmp_path):
    # 12 to 20 are older than 4: someone went back to checkpoint 3 and on from there.
    for age, step in enumerate((12, 16, 20, 4)):
        os.utime(committed(tmp_path, step) / MANIFEST, ns=(age, age))
    rotate(tmp_path / "checkpoint-4", 3, str(tmp_path / "checkpoint-12"))
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-20", "checkpoint-4"]
    rotate(tmp_path / "checkpoint-4", 1, str(tmp_path / "checkpoint-12"))
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-4"]
    rotate(tmp_path / "checkpoint-4", None, None)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-4"]
    rotate(tmp_path / "checkpoint-4", 1, None)
    assert names(tmp_path) == ["checkpoint-4"]


# Kills between any two operations on the disk.


@contextmanager
def killed_at(monkeypatch, operation: int):
    """Die in place of the n-th operation that changes a name or a file's end on the disk."""
    counter = iter(range(10_000))
    with monkeypatch.context() as patched:

        def counting(real):
            def call(*arguments, **keywords):
                if next(counter) == operation:
                    raise Killed
                return real(*arguments, **keywords)

            return call

        for owner, name in (
            (Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"),
            (os, "fsync"),
        ):  # fmt: skip
            patched.setattr(owner, name, counting(getattr(owner, name)))
        yield


def kill_everywhere(monkeypatch, tmp_path, prepare, action, check) -> int:
    """Kill an action at each of its operations; check what is left; give their number."""
    for operation in range(1000):
        folder = tmp_path / str(operation)
        folder.mkdir()
        prepare(folder)
        try:
            with killed_at(monkeypatch, operation):
                action(folder)
        except Killed:
            check(folder)
            continue
        return operation
    raise AssertionError


def test_a_kill_at_any_operation_of_a_commit_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    def prepare(folder):
        committed(folder, 1)
        committed(folder, 2, "older weights")  # is replaced
        staged(folder, "checkpoint-2")

    def action(folder):
        commit(folder / STAGING / "checkpoint-2", folder / "checkpoint-2")
        rotate(folder / "checkpoint-2", 1, None)

    def check(folder):
        assert newest(folder) is not None
        for name in names(folder):  # nothing half-written or half-removed has a checkpoint's name
            assert fault(folder / name) is None
        checkpoints.clean(folder)
        assert newest(folder) is not None

    assert kill_everywhere(monkeypatch, tmp_path, prepare, action, check) > 10


def test_a_kill_at_any_operation_of_a_final_save_is_seen(tmp_path, monkeypatch):
    def prepare(folder):
        staged(folder, "model", "new weights")
        (folder / "model").write_text("old weights")

    def action(folder):
        commit_files(folder / STAGING / "model", folder)

    def check(folder):
        if fault(folder) is None:  # it was finished
            assert (folder / "model").read_text() == "new weights"
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        staged(folder, "model", "new weights")
        action(folder)
        assert fault(folder) is None
        assert sorted(path.name for path in folder.iterdir()) == ["inner", "model", MANIFEST]

    assert kill_everywhere(monkeypatch, tmp_path, prepare, action, check) > 8


# With a Trainer.


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(tmp_path, caplog):
    whole = trained(tmp_path, **SAVING)
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    resumed = make_trainer(tmp_path, **SAVING)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is damaged: optimizer.pt" in caplog.text
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert all(fault(tmp_path / name) is None for name in names(tmp_path))  # written anew


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path):
    trainer = trained(tmp_path, max_steps=2, **SAVING)
    flip(tmp_path / "checkpoint-2" / "scheduler.pt")
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be resumed from: scheduler\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoints_hold_no_token_and_nothing_that_runs_code_when_read(tmp_path, monkeypatch):
    settings = {**SAVING, "max_steps": 4, "hub_token": "hf_a_secret"}
    trained(tmp_path, **settings)
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"hf_a_secret" not in file.read_bytes(), file
    assert not list(tmp_path.rglob("training_args.bin"))
    arguments = json.loads((tmp_path / "checkpoint-2" / "training_args.json").read_text())
    assert arguments["max_steps"] == 4

    read = []
    load = torch.load

    def safe_load(file, *arguments, **keywords):
        assert keywords["weights_only"] is True, file
        read.append(Path(file).name)
        return load(file, *arguments, **keywords)

    monkeypatch.setattr(torch, "load", safe_load)
    make_trainer(tmp_path, **settings).train(str(tmp_path / "checkpoint-2"))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(read)


def test_the_state_names_the_best_checkpoint_where_it_will_be(tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    trained(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        metric_for_best_model="ovr",
        greater_is_better=True,
        given={"evaluate_model": lambda model: {"ovr": next(scores)}},
        **SAVING,
    )
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    for name in names(tmp_path):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


# A full disk.


@contextmanager
def at_most(file_bytes: int):
    """Let no file grow beyond a size, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Weights are 128 kB and optimizer.pt is 6 times that; other files have less than 40 kB.
@pytest.mark.parametrize("file_bytes", [50_000, 100_000, 300_000])
def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(tmp_path, file_bytes):
    settings = {**SAVING, "save_total_limit": 1, "max_steps": 4}
    whole = trained(tmp_path / "whole", **settings)
    folder = tmp_path / "filled"
    trained(folder, **{**settings, "max_steps": 2})
    before = {file.name: file.read_bytes() for file in (folder / "checkpoint-2").glob("*.*")}
    trainer = make_trainer(folder, **settings)
    with (
        at_most(file_bytes),
        pytest.raises(WriteError, match=r"checkpoint-4 could not be saved: .*untouched.*--resume"),
    ):
        trainer.train(resume_from_checkpoint=True)
    assert names(folder) == ["checkpoint-2"]
    assert before == {
        file.name: file.read_bytes() for file in (folder / "checkpoint-2").glob("*.*")
    }

    resumed = make_trainer(folder, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert names(folder) == ["checkpoint-4"] and not (folder / STAGING).exists()


@pytest.mark.parametrize("operation", ["rename", "mkdir"])
def test_a_disk_that_fills_up_at_a_folder_is_a_full_disk_too(tmp_path, monkeypatch, operation):
    def full(path, *arguments, **keywords):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *arguments, **keywords)

    owner = Path if operation == "rename" else os
    real = getattr(owner, operation)
    monkeypatch.setattr(owner, operation, full)
    with pytest.raises(WriteError, match="No space left on device"):
        trained(tmp_path, **SAVING)
    assert names(tmp_path) == []


def test_other_errors_of_a_save_stay_what_they_are(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING)

    def fail(checkpoint):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(trainer, "write_beside", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        trainer.train()
