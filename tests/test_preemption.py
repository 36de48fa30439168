"""SIGTERM and SIGUSR1: save, leave, go on; two ranks that hear of it at different times."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import preemption_run
import pytest
import torch
from models_for_tests import EveryStep, make_trainer, trained, weights

from unlearn_llm.errors import Preempted
from unlearn_llm.preemption import listening

SETTINGS = {"optimizer": "dual_adamw_plus", "save_strategy": "steps", "save_steps": 100}
OFFSETS = (0.0, 0.3, 0.6, 1.0, 2.0)  # seconds; at 0.6 to 1.0 the Trainer's own saver hangs


def signalled(folder, number, at_step=3, **settings):
    """A trainer whose process gets a signal in the middle of a step."""

    def on_event(event, state, kwargs):
        if event == "before" and state.global_step == at_step - 1:
            os.kill(os.getpid(), number)

    callbacks = {"callbacks": [EveryStep(on_event)]}
    return make_trainer(folder, given=callbacks, **{**SETTINGS, **settings})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_as_if_nothing_was(tmp_path, number):
    whole = trained(tmp_path / "whole", **SETTINGS)
    trainer = signalled(tmp_path / "parts", number)
    with listening(), pytest.raises(Preempted, match=r"after step 3: checkpoint-3 is saved"):
        trainer.train()
    assert trainer.state.global_step == 3
    resumed = make_trainer(tmp_path / "parts", **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_run_that_saves_nothing_saves_when_it_is_told_to_go(tmp_path):
    trainer = signalled(tmp_path, signal.SIGTERM, save_strategy="no")
    with listening(), pytest.raises(Preempted):
        trainer.train()
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").is_file()


def test_a_signal_in_the_last_step_loses_nothing(tmp_path):
    whole = trained(tmp_path / "whole", **SETTINGS)
    with listening(), pytest.raises(Preempted, match="checkpoint-6"):
        signalled(tmp_path / "parts", signal.SIGTERM, at_step=6).train()
    resumed = make_trainer(tmp_path / "parts", **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_outside_training_a_signal_is_obeyed_at_once_and_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with listening(), pytest.raises(Preempted, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    trained(tmp_path, max_steps=1)  # what was heard then is forgotten


@pytest.mark.slow
def test_two_ranks_leave_after_the_same_step_however_far_apart_they_are_told(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [start(tmp_path, rank, shared) for rank in "01"]
    try:
        for number, offset in enumerate(OFFSETS):
            for rank in (0, 1):
                wait_for(tmp_path / f"training-{number}-{rank}", ranks)
            first, second = ranks if number % 2 else ranks[::-1]
            first.send_signal(signal.SIGTERM)
            time.sleep(offset)
            second.send_signal(signal.SIGUSR1 if number == 1 else signal.SIGTERM)
            time.sleep(0.1)  # delivered before the rank stops listening
            (tmp_path / f"sent-{number}").touch()
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0], errors(tmp_path)
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    for one, other in zip(*found, strict=True):
        assert one == other
        assert one["equal"] is True
        assert 3 <= one["step"] < preemption_run.STEPS
        assert f"checkpoint-{one['step']} is saved" in one["said"]


def start(folder: Path, rank: str, shared: dict[str, str]) -> subprocess.Popen:
    with (folder / f"errors-{rank}").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, preemption_run.__file__, str(folder), str(len(OFFSETS))],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def wait_for(file: Path, processes) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        alive = all(process.poll() is None for process in processes)
        assert alive and time.monotonic() < deadline, errors(file.parent)
        time.sleep(0.02)


def errors(folder: Path) -> str:
    return "".join((folder / f"errors-{rank}").read_text()[-3000:] for rank in (0, 1))
