"""What a run asks of its surroundings: processes, a device, packages. Can it be had?"""

import importlib.util
import os
from collections.abc import Mapping

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from unlearn_llm.errors import UserError

START = (
    "Start it with accelerate launch or torchrun, which set it, or unset WORLD_SIZE, RANK and "
    "LOCAL_RANK."
)
NEEDED_BY_OPTIMIZERS = {"bnb": "bitsandbytes", "8bit": "bitsandbytes", "paged": "bitsandbytes"}
"""Parts of the names of transformers' optimisers."""
DEVICE = "ACCELERATE_TORCH_DEVICE"


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse variables of a launcher that no group of processes can be made of.

    Half of them set would start as many runs as there are processes, all in one folder.

    Raises:
        UserError: naming the variable.
    """
    _check_device(environment.get(DEVICE))
    size = _number(environment, "WORLD_SIZE", 1)
    in_a_group = environment.get("LOCAL_RANK", "-1") != "-1"  # what accelerate goes by
    if size in (None, 1) and not in_a_group:
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            known = "LOCAL_RANK is set" if in_a_group else f"WORLD_SIZE is {size}"
            raise UserError(f"{known}, but {name} is not. {START}")
    ranks = int(environment["WORLD_SIZE"]) - 1
    for name, most in {"RANK": ranks, "LOCAL_RANK": ranks, "MASTER_PORT": 65535}.items():
        found = _number(environment, name, 0)
        if found is not None and found > most:
            raise UserError(
                f"{name} is {found}, expected at most {most} where WORLD_SIZE is {size}. {START}"
            )


def check_packages(args: TrainingArguments) -> None:
    """Refuse trackers and optimisers whose packages are not installed.

    Raises:
        UserError: naming the setting and the package.
    """
    trackers = get_available_reporting_integrations()
    for name in args.report_to or []:
        if name not in trackers:
            raise UserError(
                f"train.report_to: {name} is not installed; pip install {name}, or set it to none."
            )
    optimizer = getattr(args.optim, "value", str(args.optim))
    for part, package in NEEDED_BY_OPTIMIZERS.items():
        if part in optimizer and importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.optim: {optimizer} needs {package}, which is not installed; pip install "
                f"{package}, or choose another, such as adamw_torch."
            )


def _number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}, expected a whole number from {least}. {START}")
    return int(text)


def _check_device(name: str | None) -> None:
    if not name:
        return
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"{DEVICE} is {name!r}, expected a device such as cpu or cuda.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{DEVICE} asks for {name!r}, but torch finds no CUDA here. Unset it, or install torch "
            "with CUDA and a driver; `unlearn env` shows what there is."
        )
