"""Faults of the surroundings: processes, devices, packages that are not installed."""

from importlib.util import find_spec

from bad_inputs.case import EVAL, Bad

# accelerate looks once, so that the package cannot be hidden where it is installed.
HAS_DEEPSPEED = find_spec("deepspeed") is not None
LAUNCHED = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}

CASES = [
    Bad(
        "rank beyond the world",
        "RANK is 5",
        "WORLD_SIZE",
        environment={**LAUNCHED, "RANK": "5", "WORLD_SIZE": "2"},
    ),
    Bad(
        "a rank that is a word",
        "RANK",
        "accelerate launch",
        environment={**LAUNCHED, "RANK": "first", "WORLD_SIZE": "2"},
    ),
    Bad(
        "a world of nobody",
        "WORLD_SIZE",
        "accelerate launch",
        environment={**LAUNCHED, "RANK": "0", "WORLD_SIZE": "0"},
    ),
    Bad(
        "a world without a master",
        "MASTER_ADDR",
        "accelerate launch",
        environment={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    Bad(
        "a world without a local rank",
        "LOCAL_RANK",
        "accelerate launch",
        environment={
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
        },
    ),
    Bad(
        "a port that is none",
        "MASTER_PORT",
        "accelerate launch",
        environment={**LAUNCHED, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"},
    ),
    Bad(
        "a world of nobody (eval)",
        "WORLD_SIZE",
        "accelerate launch",
        EVAL,
        environment={**LAUNCHED, "RANK": "0", "WORLD_SIZE": "0"},
    ),
    Bad(
        "CUDA where there is none",
        "ACCELERATE_TORCH_DEVICE",
        "CUDA",
        environment={"ACCELERATE_TORCH_DEVICE": "cuda"},
    ),
    Bad(
        "CUDA where there is none (eval)",
        "ACCELERATE_TORCH_DEVICE",
        "CUDA",
        EVAL,
        environment={"ACCELERATE_TORCH_DEVICE": "cuda"},
    ),
    Bad(
        "a device that is none",
        "ACCELERATE_TORCH_DEVICE",
        "cpu",
        environment={"ACCELERATE_TORCH_DEVICE": "abacus"},
    ),
    Bad("tf32 without CUDA", "train", "tf32", more=("train.tf32=true",)),
    Bad("fp16 without CUDA", "fp16", "Use bf16", more=("train.fp16=true",)),
    Bad(
        "an optimizer that is not installed",
        "bitsandbytes",
        "pip install",
        more=("train.optim=adamw_bnb_8bit",),
        absent=("bitsandbytes",),
    ),
    Bad(
        "DeepSpeed without a launcher, or not installed",
        "DeepSpeed" if HAS_DEEPSPEED else "deepspeed",
        "Launch with" if HAS_DEEPSPEED else "Install it",
        more=("train.deepspeed=zero.json",),
        files={"zero.json": '{"zero_optimization": {"stage": 2}}'},
    ),
    Bad(
        "a tracker that is not installed",
        "wandb",
        "install",
        more=("train.report_to=wandb",),
        absent=("wandb",),
    ),
    Bad(
        "lm-eval that is not installed",
        "lm-eval",
        "pip install 'unlearn_llm[lm-eval]'",
        "eval good --suite downstream",
        absent=("lm_eval",),
    ),
    Bad(
        "lm-eval that is not installed (tasks)",
        "lm-eval",
        "pip install 'unlearn_llm[lm-eval]'",
        "export-tasks good tasks --suite downstream",
        absent=("lm_eval",),
    ),
]
