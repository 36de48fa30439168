"""Runs under an engine (DDP, FSDP2, DeepSpeed ZeRO) on CPUs, for test_engines_distributed.py.

Started by `accelerate launch --config_file recipes/accelerate/ENGINE.yaml`. Takes the engine's name
and a JSON file: a list of runs as distributed_run.py has them. Rank 0 writes what two runs are
compared by to NAME.pt. With more words these are a command line of `unlearn`, which is run.

accelerate has no FSDP on CPUs and DeepSpeed wants to be told that it is on one. So its state is made
here, beforehand, and the Trainer takes it (`use_configured_state`). For FSDP2 it says that there are
GPUs: what follows is the code that a GPU would see, on other devices.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from models_for_tests import history, make_trainer, tiny_model

CONFIGURED = {"accelerator_config": {"use_configured_state": True}}


def settle(engine: str) -> dict:
    """Make accelerate's state; give the settings of a config that go with it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        PartialState(backend="gloo")
        return {**CONFIGURED, "use_cpu": False}
    if engine == "fsdp2":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return {**CONFIGURED, "use_cpu": True}
    return {"use_cpu": True}


def train(run: dict, folder: Path, engine: str):
    """Do one run and return its trainer."""
    state = settle(engine)
    model = tiny_model(run.get("family", "llama"), lora=run.get("lora", False))
    if run.get("hidden_size"):
        model = wide_model(run["hidden_size"])
    trainer = make_trainer(folder / run["output_dir"], model, **{**run["settings"], **state})
    resume = run.get("resume")
    trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    return trainer


def result(trainer) -> dict:
    """What two runs are compared by: weights by name, and what was logged."""
    whole = trainer.whole_weights()
    return {
        "engine": str(trainer.accelerator.distributed_type),
        "ranks": trainer.args.world_size,
        "weights": {name: value.float() for name, value in whole.items()},
        **{
            key: torch.tensor(history(trainer, key), dtype=torch.float64)
            for key in ("grad_norm", "forget/grad_norm", "retain/grad_norm", "forget/loss",
                        "retain/loss")
        },
    }  # fmt: skip


def wide_model(hidden_size: int):
    """A model whose rows are whole blocks of 8-bit moments."""
    from models_for_tests import small_tokenizer
    from unlearn_llm.models import NewModel, new_model

    settings = NewModel(hidden_size=hidden_size, layers=1, heads=2, context=256)
    return new_model(settings, small_tokenizer(), 0)


def main() -> None:
    """Do all runs of the file in the order in which they stand."""
    engine, file = sys.argv[1], Path(sys.argv[2])
    for run in json.loads(file.read_text()):
        trainer = train(run, file.parent, engine)
        found = result(trainer)
        if trainer.args.process_index == 0:
            torch.save(found, file.parent / f"{run['name']}.pt")


if __name__ == "__main__":
    main()
