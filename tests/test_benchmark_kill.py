"""The benchmark of kills: what it counts, and that a few kills come out as they should."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "kill.py"


@pytest.fixture(scope="module")
def kill():
    spec = importlib.util.spec_from_file_location("kill", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_folder(folder: Path, weights: bytes, records: str, loss: float) -> Path:
    texts = folder / "evaluation" / "private"
    texts.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (texts / "records.jsonl").write_text(records)
    log = [{"loss": loss}, {"train_runtime": id(folder)}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_what_differs_is_counted(kill, tmp_path):
    whole = run_folder(tmp_path / "whole", b"weights", "a\na\nb\n", 1.0)
    same = run_folder(tmp_path / "same", b"weights", "a\na\nb\n", 1.0)
    other = run_folder(tmp_path / "other", b"Weights", "a\nc\n", 1.5)
    assert kill.compare(whole, same) == {"bit_equal": True, "records_lost": 0, "log_equal": True}
    assert kill.compare(whole, other) == {"bit_equal": False, "records_lost": 2, "log_equal": False}


def test_the_records_of_a_run_are_counted_once_however_often_it_was_killed(kill):
    one = {"run": 0, "struck": "saving", "setting": "PDU", "resumed": True, "bit_equal": True}
    lost = {**one, "run": 1, "struck": "training", "bit_equal": False, "records_lost": 3}
    counted = kill.summary([one, one, lost, {**lost, "resumed": False}])
    expected = {"kills": 4, "resumed": 3, "bit_equal": 2, "records_lost": 3, "runs": 2}
    assert {key: counted[key] for key in expected} == expected
    assert kill.table([one, one, lost]).splitlines()[2:] == [
        "| saving | 2 | 2 | 2 | 0 |",
        "| training | 1 | 1 | 0 | 3 |",
        "| all | 3 | 3 | 2 | 3 |",
    ]


@pytest.mark.slow
def test_killed_runs_end_as_the_undisturbed_ones(tmp_path):
    command = [sys.executable, str(FILE), "--kills", "6", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout)
    assert counted["kills"] >= 6
    assert counted["resumed"] == counted["bit_equal"] == counted["log_equal"] == counted["kills"]
    assert counted["records_lost"] == 0
