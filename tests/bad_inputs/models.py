"""Faults of model folders, tokenizers and adapters; all are found before weights are loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.case import EVAL, TRAIN, Bad, edited, removed

WEIGHTS = "good/model.safetensors"


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def sharded(folder: Path) -> None:
    """Weights in two files, of which one is missing."""
    shard = "model-00002-of-00002.safetensors"
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "good/model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "good/model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "good/pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def of_integers(folder: Path) -> None:
    weights = {name: value.to(torch.int32) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def larger_tokenizer(folder: Path) -> None:
    path = folder / "good/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 600, "content": "<new>"})
    path.write_text(json.dumps(content))


def adapter(**config: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "tuned").mkdir()
        text = json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, **config})
        (folder / "tuned/adapter_config.json").write_text(text)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "tuned" / name).write_bytes((folder / "good" / name).read_bytes())

    return make


def both(
    what: str, place: str, remedy: str, prepare: Callable[[Path], None], *more: str
) -> list[Bad]:
    """A fault that training and evaluation must both find."""
    return [
        Bad(f"{what} ({command.split()[0]})", place, remedy, command, more, prepare=prepare)
        for command in (TRAIN, EVAL)
    ]


CASES = [
    Bad("missing folder", "./nowhere", "there is no folder", more=("model.path=./nowhere",)),
    Bad(
        "hub id that is not here",
        "nobody/nothing",
        "cannot load",
        more=("model.path=nobody/nothing",),
    ),
    Bad(
        "a file for a folder", "./mine.yaml", "there is no folder", more=("model.path=./mine.yaml",)
    ),
    Bad(
        "folder without anything",
        "bare",
        "tokenizer.json",
        more=("model.path=./bare",),
        files={"bare": None},
    ),
    *both("no config", "good", "config.json", removed("good/config.json")),
    *both("config is no JSON", "good", "config.json", cut("good/config.json", 40)),
    *both(
        "unknown architecture",
        "config.json",
        "Check the folder",
        edited("good/config.json", model_type="blob"),
    ),
    *both("no weights", "good holds no weights", ".safetensors", removed(WEIGHTS)),
    *both("pickled weights alone", "pytorch_model.bin", "save_pretrained", pickled),
    *both("missing shard", "model-00002-of-00002.safetensors", "Fetch", sharded),
    *both("cut weights", "model.safetensors", "Fetch", cut(WEIGHTS, 4000)),
    *both("empty weights", "model.safetensors", "Fetch", cut(WEIGHTS, 0)),
    *both("weights of integers", "model.safetensors", "floating", of_integers),
    *both(
        "other sizes than the config says",
        "good",
        "config.json",
        edited("good/config.json", hidden_size=32),
    ),
    *both("tokenizer knows more than the model", "600", "model.tokenizer", larger_tokenizer),
    *both(
        "no tokenizer",
        "good",
        "tokenizer",
        removed("good/tokenizer.json", "good/tokenizer_config.json"),
    ),
    *both("cut tokenizer", "good", "tokenizer", cut("good/tokenizer.json", 500)),
    *both(
        "tokenizer without an end",
        "tokenizer",
        "eos_token",
        edited("good/tokenizer_config.json", eos_token=None),
    ),
    Bad(
        "missing tokenizer", "./nowhere", "there is no folder", more=("model.tokenizer=./nowhere",)
    ),
    Bad("no chat template", "template: chat", "Choose explicit tags", more=("data.template=chat",)),
    Bad(
        "adapter without a base",
        "tuned",
        "base_model_name_or_path",
        more=("model.path=./tuned",),
        prepare=adapter(),
    ),
    Bad(
        "adapter whose base is gone",
        "gone",
        "adapter_config.json",
        more=("model.path=./tuned",),
        prepare=adapter(base_model_name_or_path="./gone"),
    ),
    Bad(
        "adapter without weights",
        "tuned",
        "adapter_model.safetensors",
        more=("model.path=./tuned",),
        prepare=adapter(base_model_name_or_path="good", target_modules=["q_proj"]),
    ),
    Bad(
        "adapter of an unknown kind",
        "tuned",
        "peft_type",
        more=("model.path=./tuned",),
        prepare=adapter(base_model_name_or_path="good", peft_type="MAGIC"),
    ),
    Bad(
        "LoRA on layers that are none",
        "model.lora",
        "q_proj",
        more=("model.lora={target_modules: [nothing]}",),
    ),
    Bad("LoRA of rank 0", "model.lora", "lora.r", more=("model.lora={r: 0}",)),
    Bad("unknown dtype", "model.dtype", "expected auto", more=("model.dtype=float8",)),
    Bad(
        "attention that is not installed",
        "model.attention",
        "sdpa",
        more=("model.attention=flash_attention_2",),
    ),
    Bad("unknown attention", "model.attention", "sdpa", more=("model.attention=quick",)),
    Bad("unknown keyword of the model", "colour", "model.extra", more=("model.extra={colour: 1}",)),
]
