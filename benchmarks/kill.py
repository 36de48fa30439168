"""SIGKILL at random moments of `unlearn train`, each followed by `unlearn train --resume`.

    python benchmarks/kill.py --kills 200 --folder outputs/kill [--json]

What runs is the recipe of the demo, synthetic/unlearn, small enough to be run hundreds of times, in
three settings that keep unlike things from step to step: DualOptim+ (moments of both roles), PDU
(dual variables), and an adapter with dropout under 8-bit DualOptim (random numbers, byte codes).
Every run is the command line in a process of its own, forked after the imports; it is killed some
times, goes on each time, and its end is compared with the undisturbed run: bytes of the weights,
lines of records.jsonl, log lines of all steps.

Every kill is a line of FOLDER/kills.jsonl; called again, the benchmark goes on from there.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # forks want no threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The libraries read these variables when they are imported.
from tqdm import tqdm

from unlearn_llm import cli
from unlearn_llm.checkpoints import MANIFEST, STAGING, fault
from unlearn_llm.pipeline import run_train  # noqa: F401  imported before the forks

TARGET = ("model.new.hidden_size=64", "model.new.layers=2", "evaluate=null")
SMALL = (
    "train.max_steps=16",
    "train.save_strategy=steps",
    "train.save_steps=4",
    "train.save_total_limit=2",
    "train.logging_steps=2",
    "train.per_device_train_batch_size=8",
    "train.use_cpu=true",
    "evaluate.reference=null",
    "evaluate.overrides={limit: 16}",
)
SETTINGS = {
    "DualOptim+": (),
    "PDU": (
        "train.schedule=joint",
        "train.schedule_parameters={}",
        "train.optimizer=null",
        "train.optimizer_parameters={}",
        "train.forget_learning_rate=null",
        "train.combine=pdu",
    ),
    "LoRA, dropout, 8 bit": (
        "model.lora={r: 64, alpha: 64, dropout: 0.1}",
        "train.objective=npo+gd",
        "train.optimizer=dual_adamw",
        "train.optimizer_parameters={state_bits: 8, rounding: stochastic}",
    ),
}
AIMS = ("anywhere", "saving", "saving", "anywhere", "saving", "evaluation")
"""What the kills of one run wait for, in turn."""
GIVE_UP = 600.0  # seconds


def main() -> None:
    """Kill, resume, compare, and print what was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("outputs/kill"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = given.folder / "kills.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )
    # The usual lock of the bars is shared by forks: who is killed with it would stop all others.
    tqdm.set_lock(threading.RLock())
    wholes = prepare(given.folder)
    bar = tqdm(total=given.kills, initial=len(done), desc="kills", disable=given.json)
    run = max((kill["run"] for kill in done), default=-1)
    while len(done) < given.kills:
        run += 1  # also after a run that ended before its first kill
        kills = disturbed_run(given.folder, wholes, run, random.Random(f"{given.seed}/{run}"))
        with results.open("a") as file:
            file.writelines(json.dumps({"run": run, **kill}) + "\n" for kill in kills)
        done += [{"run": run, **kill} for kill in kills]
        bar.update(len(kills))
    bar.close()
    print(json.dumps(summary(done)) if given.json else table(done))


def prepare(folder: Path) -> dict[str, float]:
    """Make the target and the undisturbed runs; give the seconds of each."""
    target = folder / "target"
    if fault(target) is not None:
        arguments = [*TARGET, f"train.output_dir={target}", "--overwrite"]
        assert finish(start(folder, "finetune", "synthetic/target", arguments)) == 0
    seconds = {}
    for name in SETTINGS:
        times = folder / f"{slug(name)}.json"
        if not times.is_file():
            began = time.perf_counter()
            assert finish(train(folder, name, folder / slug(name), "--overwrite")) == 0
            times.write_text(json.dumps(time.perf_counter() - began))
        seconds[name] = json.loads(times.read_text())
    return seconds


def disturbed_run(
    folder: Path, wholes: dict[str, float], number: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Kill one run some times; let it end; say of every kill what became of it."""
    name = list(SETTINGS)[number % len(SETTINGS)]
    output, whole = folder / "disturbed", folder / slug(name)
    shutil.rmtree(output, ignore_errors=True)
    kills: list[dict[str, Any]] = []
    code: int | None = 0
    for where in AIMS:
        process = train(folder, name, output, "--resume")
        code, has_begun = kill_at(process, output, where, wholes[name], draw)
        if code is not None:  # it ended before its time to be killed came
            break
        kills.append(
            {"setting": name, "aimed": where, "struck": phase(output, has_begun), "resumed": True}
        )
    else:
        code = finish(train(folder, name, output, "--resume"))
    if kills:
        kills[-1]["resumed"] = code == 0
    same = compare(whole, output) if code == 0 else {"bit_equal": False}
    return [{**kill, **same} for kill in kills]


def kill_at(
    process: int, output: Path, where: str, whole_seconds: float, draw: random.Random
) -> tuple[int | None, bool]:
    """Kill a process at a random moment.

    Returns:
        Its exit code if it ended before, else None; whether what an earlier kill left was removed
        by then.
    """
    saves_to_wait = draw.randint(1, 2)
    deadline = time.perf_counter() + draw.uniform(0.0, 0.6 * whole_seconds)
    if where != "anywhere":
        deadline = float("inf")
    was_saving, has_begun, began = False, False, time.perf_counter()
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), True
        if time.perf_counter() - began > GIVE_UP:
            raise SystemExit(f"{output} hangs: see child.log")
        has_begun = has_begun or not (output / STAGING).exists()
        is_saving = has_begun and (output / STAGING).exists()
        if where == "saving" and is_saving and not was_saving and deadline == float("inf"):
            saves_to_wait -= 1
            if saves_to_wait == 0:
                deadline = time.perf_counter() + draw.uniform(0.0, 0.06)
        if where == "evaluation" and (output / MANIFEST).exists() and deadline == float("inf"):
            deadline = time.perf_counter() + draw.uniform(0.0, whole_seconds / 3)
        was_saving = is_saving
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return (None if code == -signal.SIGKILL else code), has_begun


def phase(output: Path, has_begun: bool) -> str:
    """Say what a killed run was doing, from what it left."""
    if (output / STAGING).exists():
        return "saving" if has_begun else "starting"
    if (output / MANIFEST).exists():
        return "evaluation"
    return "training" if any(output.glob("checkpoint-*")) else "before the first checkpoint"


def compare(whole: Path, other: Path) -> dict[str, Any]:
    """Compare the results of two runs."""
    (weights,) = whole.glob("*.safetensors")
    texts = Path("evaluation", "private", "records.jsonl")
    records = [(run / texts).read_text().splitlines() for run in (whole, other)]
    found = Counter(records[1])
    return {
        "bit_equal": weights.read_bytes() == (other / weights.name).read_bytes(),
        "records_lost": sum((Counter(records[0]) - found).values()),
        "log_equal": log(whole) == log(other),
    }


def log(run: Path) -> list[dict[str, Any]]:
    """Give the log lines of a run's steps; the last line has its seconds."""
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [line for line in lines if "train_runtime" not in line]


def summary(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Count."""
    runs = {kill["run"]: kill for kill in kills}.values()
    return {
        "kills": len(kills),
        "resumed": sum(kill["resumed"] for kill in kills),
        "bit_equal": sum(kill["bit_equal"] for kill in kills),
        "records_lost": sum(run.get("records_lost", 0) for run in runs),
        "log_equal": sum(kill.get("log_equal", False) for kill in kills),
        "runs": len(runs),
        "struck": dict(Counter(kill["struck"] for kill in kills)),
        "settings": dict(Counter(kill["setting"] for kill in kills)),
    }


def table(kills: list[dict[str, Any]]) -> str:
    """Write the counts by what the kill struck, as Markdown."""
    lines = ["| struck | kills | resumed | bitwise equal | records lost |", "|---|---|---|---|---|"]
    groups = {
        name: [kill for kill in kills if kill["struck"] == name]
        for name in summary(kills)["struck"]
    }
    for name, group in {**groups, "all": kills}.items():
        counts = summary(group)
        cells = [counts[key] for key in ("kills", "resumed", "bit_equal", "records_lost")]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def train(folder: Path, name: str, output: Path, option: str) -> int:
    """Start `unlearn train` in one of the settings."""
    arguments = [f"model.path={folder / 'target'}", f"train.output_dir={output}", option]
    return start(folder, "train", "synthetic/unlearn", [*SMALL, *SETTINGS[name], *arguments])


def start(folder: Path, command: str, recipe: str, arguments: list[str]) -> int:
    """Start the command line in a new process; give its id."""
    process = os.fork()
    if process:
        return process
    log_file = os.open(folder / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    sys.argv = ["unlearn", command, recipe, *arguments]
    code: Any = 1
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


def finish(process: int) -> int:
    """Wait for a process; give its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def slug(name: str) -> str:
    """Name a folder after a setting."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


if __name__ == "__main__":
    main()
