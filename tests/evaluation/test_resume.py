"""An interrupted evaluation, continued, leaves the files of an undisturbed one, byte for byte."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from models_for_tests import small_tokenizer, tiny_model
from slow_twins import lean_towards_the_end

from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.generator import Generator
from unlearn_llm.evaluation.journal import PATTERN
from unlearn_llm.evaluation.records import read_private_records
from unlearn_llm.evaluation.scorer import Scorer
from unlearn_llm.evaluation.suite import Suite

SMALL = {"limit": 4, "max_new_tokens": 8}
BUDGET = 300  # a few rows per batch
TEXTS = "private/records.jsonl"


class Stop(Exception):
    """In place of a killed process."""


def run(folder, model=None, encoder=None, **settings):
    suite = Suite.load("synthetic", **{**SMALL, **settings})
    if model is None:
        model = tiny_model()
        lean_towards_the_end(model, by=0.1)
    encoder = encoder or Encoder(small_tokenizer(), max_length=256)
    return evaluate(suite, model, encoder, folder, token_budget=BUDGET)


@pytest.fixture
def calls(monkeypatch):
    """Counts batches; `calls.stop_at` stops before one of them is kept."""

    class Calls:
        count = 0
        stop_at = None

    for kind in (Scorer, Generator):

        def counting(self, batch, original=kind.answer):
            Calls.count += 1
            if Calls.count == Calls.stop_at:
                raise Stop
            return original(self, batch)

        monkeypatch.setattr(kind, "answer", counting)
    return Calls


def interrupted(folder, calls, stop_at, **keywords):
    calls.count, calls.stop_at = 0, stop_at
    with pytest.raises(Stop):
        run(folder, **keywords)
    calls.count, calls.stop_at = 0, None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return (folder / TEXTS).read_bytes()


def test_an_evaluation_goes_on_where_it_stopped(tmp_path, calls, undisturbed):
    run(tmp_path / "whole")
    batches = calls.count
    assert batches > 5
    for stop_at in (1, 2, batches - 1, batches):
        folder = tmp_path / str(stop_at)
        interrupted(folder, calls, stop_at)
        run(folder)
        assert calls.count == batches - stop_at + 1  # nothing is asked twice
        assert (folder / TEXTS).read_bytes() == undisturbed
        left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
        assert left == ["private", TEXTS, "records.jsonl", "scores.json"]


def test_several_interruptions_add_up(tmp_path, calls, undisturbed):
    for _ in range(3):
        interrupted(tmp_path, calls, stop_at=3)  # two batches more each time
    run(tmp_path)
    assert (tmp_path / TEXTS).read_bytes() == undisturbed


def test_a_batch_that_was_torn_by_the_kill_is_asked_again(tmp_path, calls, undisturbed):
    interrupted(tmp_path, calls, stop_at=5)
    (path,) = tmp_path.rglob(PATTERN)
    path.write_bytes(path.read_bytes()[:-7])
    run(tmp_path)
    assert (tmp_path / TEXTS).read_bytes() == undisturbed


def test_answers_outlive_a_failing_measurement(tmp_path, calls, monkeypatch, undisturbed):
    def full_disk(*given):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("unlearn_llm.evaluation.evaluate.write_records", full_disk)
        with pytest.raises(OSError, match="No space"):
            run(tmp_path)
    calls.count = 0
    run(tmp_path)
    assert calls.count == 0
    assert (tmp_path / TEXTS).read_bytes() == undisturbed


def another_weight():
    model = tiny_model()
    lean_towards_the_end(model, by=0.1)
    model.model.layers[0].mlp.up_proj.weight.data[5, 7] += 1e-3
    return model


def with_a_token():
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.add_tokens(["zzz"])
    return tokenizer


CHANGES = {
    "fingerprint": lambda: {"model": another_weight()},
    "template": lambda: {"encoder": Encoder(small_tokenizer(), "phi", max_length=256)},
    "max_length": lambda: {"encoder": Encoder(small_tokenizer(), max_length=200)},
    "tokenizer": lambda: {"encoder": Encoder(with_a_token(), max_length=256)},
    "questions": lambda: {"limit": 3},
    "max_new_tokens": lambda: {"max_new_tokens": 7},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_answers_of_another_evaluation_are_never_mixed(tmp_path, calls, caplog, changed):
    interrupted(tmp_path / "old", calls, stop_at=5)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "old", **CHANGES[changed]())
    (line,) = [record.getMessage() for record in caplog.records if "interrupted" in record.msg]
    assert f"differs in {changed}." in line
    run(tmp_path / "new", **CHANGES[changed]())
    files = [tmp_path / name / TEXTS for name in ("old", "new")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_suite_with_the_same_questions_may_measure_something_else(tmp_path, calls):
    interrupted(tmp_path, calls, stop_at=5)
    run(tmp_path, objective_kind="targeted")
    done = calls.count
    calls.count = 0
    run(tmp_path / "whole", objective_kind="targeted")
    assert done == calls.count - 4


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from test_resume import run
from unlearn_llm.evaluation.journal import Journal

def child(folder):
    number = os.fork()
    if number == 0:
        add, added = Journal.add, []
        def adding(self, answers):
            add(self, answers)
            added.append(answers)
        Journal.add = adding
        run(folder, limit=30, max_new_tokens=30)
        os._exit(len(added))
    return number

def kept(folder):
    try:
        return sum(path.read_bytes().count(b"\\n") for path in folder.rglob("answers-*.jsonl"))
    except FileNotFoundError:  # removed as we look: the child is done
        return 0

def runs(number):
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

main = Path(sys.argv[1])
_, status = os.waitpid(child(main / "whole"), 0)
batches = os.waitstatus_to_exitcode(status)
expected = (main / "whole" / "private" / "records.jsonl").read_bytes()
moments, found = random.Random(0), []
for kill in range(10):
    folder = main / str(kill)
    number, least = child(folder), moments.randrange(batches)
    # By what is done and not by time, which other work makes longer.
    while kept(folder) < least and runs(number):
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.02))
    os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    left = kept(folder)
    os.waitpid(child(folder), 0)
    same = (folder / "private" / "records.jsonl").read_bytes() == expected
    found.append({"killed": os.WIFSIGNALED(status), "kept": left, "same": same})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_and_change_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", paths() + KILLS, str(tmp_path)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10 and all(kill["same"] for kill in found), found
    in_the_middle = [kill for kill in found if kill["killed"] and kill["kept"] > 1]
    assert len(in_the_middle) >= 5, found


TWO = """
import os, sys
import torch
torch.distributed.init_process_group("gloo")
from ranks import leave
from test_resume import run
from unlearn_llm.evaluation.journal import Journal
folder, stop_at = sys.argv[1], int(sys.argv[2])
original, added = Journal.add, []
def adding(self, answers):
    original(self, answers)
    added.append(len(answers))
    if len(added) == stop_at:
        os._exit(1)
Journal.add = adding
run(folder)
with open(f"{folder}.added", "a") as file:
    file.write(f"{sum(added)}\\n")
leave()
"""


def paths():
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return f"import sys; sys.path[:0] = {folders!r}\n"


def with_two_processes(tmp_path, folder, stop_at):
    script = tmp_path / "two.py"
    script.write_text(paths() + TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run(
        [*launcher, str(script), str(folder), str(stop_at)], capture_output=True, text=True
    )


def assert_close(folder, expected):
    """Other batches round otherwise, in the last digits."""
    for ours, theirs in zip(read_private_records(folder), expected, strict=True):
        assert ours["generation"] == theirs["generation"]
        for name, value in theirs["metrics"].items():
            assert ours["metrics"][name] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path, calls):
    folder = tmp_path / "folder"
    assert with_two_processes(tmp_path, folder, stop_at=3).returncode != 0
    kept = {path.name: path.read_text().count("\n") for path in folder.rglob(PATTERN)}
    assert kept == {"answers-0.jsonl": 4, "answers-1.jsonl": 4}  # with a first line each
    run(folder)
    done = calls.count
    calls.count = 0
    run(tmp_path / "whole")
    assert 0 < done < calls.count
    assert_close(folder, read_private_records(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(tmp_path, calls):
    interrupted(tmp_path / "folder", calls, stop_at=5)
    (path,) = (tmp_path / "folder").rglob(PATTERN)
    kept = sum(len(json.loads(line)) for line in path.read_text().splitlines()[1:])
    done = with_two_processes(tmp_path, tmp_path / "folder", stop_at=-1)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "whole")
    expected = read_private_records(tmp_path / "whole")
    assert_close(tmp_path / "folder", expected)
    details = json.loads((tmp_path / "folder" / "scores.json").read_text())
    added = [int(line) for line in (tmp_path / "folder.added").read_text().splitlines()]
    assert len(added) == 2
    assert sum(added) == sum(details["requests"].values()) - kept
