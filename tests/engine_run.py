"""Runs under an engine (DDP, FSDP2, DeepSpeed ZeRO) on CPUs, for test_engines_distributed.py.

Started by `accelerate launch --config_file recipes/accelerate/ENGINE.yaml`. Takes the engine's name
and a JSON file: a list of runs as distributed_run.py has them. Rank 0 writes what two runs are
compared by to NAME.pt. Instead of the file: `unlearn` and the words of a command, which is run.

accelerate has no FSDP on CPUs, and DeepSpeed is not told that it is on one. So accelerate's state
is made here, and the Trainer takes it (`use_configured_state`). For FSDP2 it says that there are
GPUs: what follows is the code that runs on GPUs, on other devices.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from models_for_tests import history, make_trainer, small_tokenizer, tiny_model
from ranks import leave
from transformers import training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from unlearn_llm.errors import NonFiniteError
from unlearn_llm.models import NewModel, new_model


def settle(engine: str) -> dict:
    """Make accelerate's state; give the settings of a config that go with it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # or the next model would be made in shards, with other weights
    if engine == "ddp":
        return {"use_cpu": True}
    if engine == "fsdp2":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        training_args.is_torch_bf16_gpu_available = lambda: True  # asked for without use_cpu
        PartialState(backend="gloo")
    return {"use_cpu": engine == "fsdp2", "accelerator_config": {"use_configured_state": True}}


def make_model(run: dict):
    """The model at the start; one with hidden size 256 has rows of whole 8-bit blocks."""
    if not run.get("wide"):
        return tiny_model(run.get("family", "llama"), lora=run.get("lora", False))
    return new_model(NewModel(hidden_size=256, layers=1, heads=2, context=256), small_tokenizer())


def train(run: dict, folder: Path, engine: str):
    """Do one run and return its trainer."""
    state, model = settle(engine), make_model(run)
    trainer = make_trainer(folder / run["output_dir"], model, **{**run["settings"], **state})
    resume = run.get("resume")
    try:
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    except NonFiniteError:
        assert run.get("stops")
    return trainer


def result(trainer) -> dict:
    """What two runs are compared by: weights by name, and what was logged."""
    return {
        "engine": str(trainer.accelerator.distributed_type),
        "ranks": trainer.args.world_size,
        "weights": {name: value.float() for name, value in trainer.whole_weights().items()},
        **{
            key: torch.tensor(history(trainer, key), dtype=torch.float64)
            for key in ("grad_norm", "forget/grad_norm", "retain/grad_norm", "forget/loss",
                        "retain/loss", "forget/learning_rate")
        },
    }  # fmt: skip


def main() -> None:
    """Do all runs of the file in the order in which they stand, or a command."""
    engine = sys.argv[1]
    if sys.argv[2] == "unlearn":
        settle(engine)
        sys.argv[:3] = ["unlearn"]
        try:
            runpy.run_module("unlearn_llm", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
        leave()
    file = Path(sys.argv[2])
    for run in json.loads(file.read_text()):
        trainer = train(run, file.parent, engine)
        found = result(trainer)
        if trainer.args.process_index == 0:
            torch.save(found, file.parent / f"{run['name']}.pt")
    leave()


if __name__ == "__main__":
    main()
