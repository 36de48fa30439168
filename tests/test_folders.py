"""Two runs, one folder."""

import os
import signal
import subprocess
import sys

import pytest

from unlearn_llm.errors import UserError
from unlearn_llm.folders import LOCK, alone, check_output, take

HOLD = f"""
import fcntl, os, sys, time
with open(sys.argv[1] + "/{LOCK}", "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(f"process {{os.getpid()}} on a machine", file=file, flush=True)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has the lock of `out`."""
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_whose_the_folder_is(tmp_path, other_run):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=rf"being written by another run \(process {other_run.pid}"):
        check_output(folder, "train.output_dir")
    with alone(), pytest.raises(UserError, match="Wait for it, stop it, or give another folder"):
        take(folder)
    assert (folder / LOCK).is_file()  # the refused run has left the other's lock alone
    with pytest.raises(UserError, match="another run"):
        check_output(folder, "train.output_dir")


def test_what_a_killed_run_leaves_locks_nobody_out(tmp_path, other_run):
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    folder = tmp_path / "out"
    assert (folder / LOCK).is_file()
    check_output(folder, "train.output_dir")
    with alone():
        take(folder)
        assert f"process {os.getpid()} " in (folder / LOCK).read_text()
    assert not folder.joinpath(LOCK).exists()


def test_a_folder_is_given_back_and_goes_if_nothing_was_written(tmp_path):
    kept, empty = tmp_path / "a" / "kept", tmp_path / "b" / "empty"
    with pytest.raises(RuntimeError), alone():
        for folder in (kept, empty, kept):  # twice by one run is no conflict
            take(folder)
        (kept / "file").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept", "file"]


@pytest.mark.slow
def test_of_two_runs_at_once_one_goes_on(tmp_path):
    """As many processes as cores at the same folder, again and again: never two inside."""
    code = """
import sys, time
from pathlib import Path
from unlearn_llm.errors import UserError
from unlearn_llm.folders import alone, take
folder, until = Path(sys.argv[1]), time.time() + 1.5
entered = 0
while time.time() < until:
    try:
        with alone():
            take(folder)
            inside = folder.parent / "inside"
            inside.mkdir()  # fails if somebody is
            entered += 1
            inside.rmdir()
    except UserError:
        pass
print(entered)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    entered = [int(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(entered) > 10
