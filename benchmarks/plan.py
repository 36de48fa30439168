"""What `unlearn plan` says against what a run takes: peak memory and time per step on a CPU.

    python benchmarks/plan.py [--only NAME] [--json]

The planner sees a folder with config.json and a tokenizer; the run makes a model of that config
with random weights. Each run has a process of its own, which trains a tiny model first, so that
imports and buffers of libraries are there; measured is the most that it holds beyond that, while it
trains STEPS steps. One thread; freed memory is returned at once.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from unlearn_llm import synthetic
from unlearn_llm.encode import Encoder
from unlearn_llm.models import ModelSettings, NewModel, add_lora, new_config, new_tokenizer
from unlearn_llm.pipeline import forget_and_retain
from unlearn_llm.planning.hardware import find
from unlearn_llm.planning.plan import plan
from unlearn_llm.recipe import Recipe
from unlearn_llm.trainer import UnlearnTrainer

STEPS = 3
WITHIN = 0.15
TINY = NewModel(hidden_size=32, layers=2, heads=2, vocabulary=1000, context=256)
LLAMA = NewModel("llama", hidden_size=512, layers=8, heads=8, vocabulary=16_000, context=256)
PHI = NewModel("phi", hidden_size=512, layers=8, heads=8, vocabulary=8_000, context=256)
DEEP = NewModel("llama", hidden_size=384, layers=16, heads=6, vocabulary=4_000, context=256)
WIDE = NewModel("llama", hidden_size=256, layers=4, heads=4, vocabulary=128_256, context=256)
ALTERNATE = {"schedule": "alternate", "schedule_parameters": {"forget": 1, "retain": 1}}
JOINT = {"schedule": "joint"}
PLUS = {**ALTERNATE, "optimizer": "dual_adamw_plus"}
EIGHT = {"state_bits": 8}
LORA = {"lora": {"r": 16, "alpha": 32}}

# By title: the new model, train, model.
SETTINGS: dict[str, tuple[NewModel, dict[str, Any], dict[str, Any]]] = {
    "AdamW, alternate": (LLAMA, {**ALTERNATE}, {}),
    "AdamW, joint": (LLAMA, {**JOINT, "per_device_train_batch_size": 8}, {}),
    "DualOptim": (PHI, {**ALTERNATE, "optimizer": "dual_adamw"}, {}),
    "DualOptim+": (LLAMA, PLUS, {}),
    "DualOptim+ 8 bit": (LLAMA, {**PLUS, "optimizer_parameters": EIGHT}, {}),
    "DualOptim+ 8 bit, phi, 48 rows": (
        PHI,
        {**PLUS, "optimizer_parameters": EIGHT, "per_device_train_batch_size": 48},
        {},
    ),
    "16 layers, 48 rows": (DEEP, {**PLUS, "per_device_train_batch_size": 48}, {}),
    "16 layers, 48 rows, checkpointing": (
        DEEP,
        {**PLUS, "per_device_train_batch_size": 48, "gradient_checkpointing": True},
        {},
    ),
    "bf16": (LLAMA, {**PLUS, "per_device_train_batch_size": 8, "bf16": True}, {}),
    "16 layers, 48 rows, LoRA": (DEEP, {**PLUS, "per_device_train_batch_size": 48}, LORA),
    "LoRA, bfloat16 weights": (LLAMA, PLUS, {**LORA, "dtype": "bfloat16"}),
    "LoRA, checkpointing": (DEEP, {**PLUS, "gradient_checkpointing": True}, LORA),
    "4 x 5 rows, accumulated": (
        PHI,
        {**PLUS, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 4},
        {},
    ),
    "npo+kl, a frozen copy": (LLAMA, {**JOINT, "objective": "npo+kl"}, {}),
    "dpo+ap, phi": (PHI, {**PLUS, "objective": "dpo+ap"}, {}),
    "me+gd, 128,256 words": (WIDE, {**PLUS, "objective": "me+gd"}, {}),
    "surgery": (LLAMA, {**JOINT, "combine": "surgery"}, {}),
    "gru": (PHI, {**JOINT, "combine": "gru"}, {}),
    "salun": (LLAMA, {**JOINT, "mask": "salun"}, {}),
    "part of the weights": (LLAMA, {**PLUS, "trainable": "layers.[67]|lm_head|norm"}, {}),
}


def main() -> None:
    """Plan and measure every setting; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="a setting's title")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(json.dumps(_measured(given.measure)))
        return
    rows = compare(given.only or list(SETTINGS))
    print(json.dumps(rows) if given.json else _markdown(rows))


def compare(titles: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Plan and measure; rows by title."""
    hardware, rows = find("CPU"), {}
    for title in titles:
        with tempfile.TemporaryDirectory() as folder:
            planned = plan(_recipe(title, Path(folder)), hardware)
        row = {
            "planned": planned.memory.peak,
            "planned_seconds": sum(
                planned.steps[kind] * seconds for kind, seconds in planned.seconds_per_step.items()
            )
            / STEPS,
            "millions": planned.weights.entries / 1e6,
            "parts": planned.memory.parts,
            **_of_another_process(title),
        }
        row["error"] = row["planned"] / row["measured"] - 1
        rows[title] = row
        print(_line(title, row), file=sys.stderr, flush=True)
    return rows


def _recipe(title: str, folder: Path, new: NewModel | None = None, **train: Any) -> Recipe:
    """The recipe of a setting, with a folder that holds its config and tokenizer."""
    of_setting, settings, model = SETTINGS[title]
    rows = [*synthetic.generate("forget10"), *synthetic.generate("retain90")]
    texts = [row[column] for row in rows for column in ("question", "answer")]
    tokenizer = new_tokenizer(texts, 1000)
    new_config(new or of_setting, None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if settings.get("optimizer"):  # compiling would be measured too
        own = settings.get("optimizer_parameters", {})
        settings = {**settings, "optimizer_parameters": {**own, "compile": False}}
    document = {
        "model": {"path": str(folder), **model},
        "data": {
            "forget": "synthetic/forget10",
            "retain": "synthetic/retain90",
            "template": "plain",
            "max_length": 256,
        },
        "train": {
            "objective": "idk+gd",
            "per_device_train_batch_size": 20,
            "max_steps": STEPS,
            "learning_rate": 1e-5,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": str(folder / "run"),
            **settings,
            **train,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(document), encoding="utf-8")  # which is YAML
    return Recipe.load(file)


def _train(recipe: Recipe) -> tuple[int, float]:
    """Train; give the most memory held while it did, and the seconds of a step."""
    settings: ModelSettings = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(settings.path)
    forget, retain = forget_and_retain(recipe.data)
    encoder = Encoder(tokenizer, recipe.data.template, recipe.data.max_length)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(settings.path), dtype=dtype
    )
    if settings.lora is not None:
        model = add_lora(model, settings.lora)
    args: Any = recipe.arguments()
    trainer = UnlearnTrainer(
        model,
        args,
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        encoder=encoder,
    )
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    started = time.process_time()
    trainer.train()
    return _memory("VmHWM"), (time.process_time() - started) / args.max_steps


def _measured(title: str) -> dict[str, float]:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(title, Path(folder), TINY)
        if "trainable" in recipe.train:
            recipe.train["trainable"] = None
        _train(recipe)
    gc.collect()
    before = _memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        peak, seconds = _train(_recipe(title, Path(folder)))
    return {"measured": peak - before, "measured_seconds": seconds}


def _of_another_process(title: str) -> dict[str, float]:
    # Blocks above 64 KiB are mapped one by one, so that freed memory is not counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", title]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _line(title: str, row: dict[str, Any]) -> str:
    return (
        f"| {title} | {row['millions']:.0f} | {row['planned'] / 2**20:.0f} "
        f"| {row['measured'] / 2**20:.0f} | {row['error']:+.1%} "
        f"| {row['planned_seconds']:.1f} | {row['measured_seconds']:.1f} |"
    )


def _markdown(rows: dict[str, Any]) -> str:
    head = "| setting | million weights | MiB planned | MiB measured | error | s planned | s |"
    inside = sum(abs(row["error"]) <= WITHIN for row in rows.values())
    lines = [head, "|---" * 7 + "|", *(_line(title, row) for title, row in rows.items())]
    return "\n".join([*lines, "", f"{inside} of {len(rows)} within {WITHIN:.0%}."])


if __name__ == "__main__":
    main()
