"""Every faulty input is answered in one line: what, where and what to do; nothing is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import commands, data, environment, models, recipes
from bad_inputs.case import EVAL, TRAIN, Bad, make_good_folder
from bad_inputs.rights import without_privileges

from unlearn_llm import cli

TABLES = {"data": data, "model": models, "recipe": recipes, "command": commands, "env": environment}
CASES = [
    pytest.param(case, id=f"{kind}: {case.what}")
    for kind, table in TABLES.items()
    for case in table.CASES
]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_good_folder(folder)
    return folder


@pytest.fixture
def work(good, tmp_path, monkeypatch) -> Path:
    """Stand in a copy of the folder in which nothing is wrong yet."""
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    found = {}
    for path in folder.rglob("*"):
        readable = path.is_file() and os.access(path, os.R_OK)
        found[str(path)] = path.read_bytes() if readable else None
    return found


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unlearn", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def told(error_output: str) -> str:
    """The one line; bars of progress are none."""
    lines = [line for line in error_output.splitlines() if "it/s" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), error_output
    assert "Traceback" not in error_output and "\x1b" not in error_output
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_a_faulty_input_is_answered_in_one_line(case: Bad, work, monkeypatch, capsys):
    case.make(work)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    for name in case.absent:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)
    before = contents(work)
    capsys.readouterr()
    with without_privileges() as permissions_hold:
        if case.of_permissions and not permissions_hold:
            pytest.skip("root reads and writes everything here")
        code = run(monkeypatch, *case.words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    line = told(err)
    assert case.place in line and case.remedy in line
    assert contents(work) == before
    assert ("Loading weights" in err) <= case.shows_late


def test_the_table_is_long_and_says_everything_once():
    names = [case.id for case in CASES]
    assert len(names) == len(set(names)) >= 60
    assert all(case.values[0].place and case.values[0].remedy for case in CASES)


def test_the_folder_without_a_fault_trains_and_is_measured(work, monkeypatch, capsys):
    assert run(monkeypatch, *TRAIN.split(), "--json") == 0
    assert run(monkeypatch, *EVAL.split(), "--json") == 0
    assert not list(work.rglob(".unlearn.lock"))


@pytest.mark.parametrize(
    ("command", "folder"),
    [(TRAIN, "out"), ("train mine.yaml --resume", "out"), (EVAL, "scored/synthetic/good")],
)
def test_a_folder_that_another_run_writes_is_left_alone(work, monkeypatch, capsys, command, folder):
    code = (
        f"import fcntl, time; file = open('{folder}/.unlearn.lock', 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            before = contents(work)
            assert run(monkeypatch, *command.split()) == 2
            line = told(capsys.readouterr().err)
            assert f"{folder} is being written by another run. Wait for it" in line
            assert contents(work) == before
        finally:
            other.kill()


def test_a_name_with_escapes_is_shown_without_them(work, monkeypatch, capsys):
    hostile = "\x1b[31mred\x1b]0;title\x07"
    (work / "good").rename(work / hostile)
    words = [hostile if word == "good" else word for word in EVAL.split()]
    assert run(monkeypatch, *words) == 0
    out, err = capsys.readouterr()
    assert "\\x1b[31mred" in out
    assert not {"\x1b", "\x07"} & set(out + err)


def process(*words: str | bytes, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "unlearn_llm", *words],
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **keywords.pop("env", {})},
        **keywords,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", b"\xff.yaml"], "\\udcff.yaml"),
        (["show", "./\x1b]0;title\x07.yaml"], "\\x1b]0;title\\x07.yaml"),
        (["train", "mine.yaml", "--nonsense"], "No such option: --nonsense. See `python -m"),
    ],
)
def test_a_process_answers_in_one_line(work, words, said):
    done = process(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in told(done.stderr.decode())


def test_a_reader_that_goes_away_leaves_no_traceback():
    command = [sys.executable, "-m", "unlearn_llm", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
        asked.stdout.close()
        assert asked.stderr.read() == b""
    assert asked.returncode == 1
