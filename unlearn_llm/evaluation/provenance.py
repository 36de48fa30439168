"""Of which model, and made with what: what a number needs to be believed later."""

import hashlib
import importlib.metadata
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from unlearn_llm.encode import Encoder
from unlearn_llm.scoring import unwrapped

PACKAGES = ("unlearn_llm", "transformers", "torch", "rouge-score", "scipy")


def versions() -> dict[str, str]:
    """Give the versions of the packages that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_model(model: nn.Module, encoder: Encoder) -> dict[str, Any]:
    """Name a model, and give a fingerprint that changes with its weights."""
    inner = unwrapped(model)
    path = str(inner.config.name_or_path)
    template = encoder.template
    return {
        # A folder's own name only: results travel, and the folders of one machine stay at home.
        "name": Path(path).name if Path(path).is_dir() else path,
        "type": inner.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        "template": template if isinstance(template, str) else asdict(template),
        "max_length": encoder.max_length,
    }


def fingerprint(model: nn.Module, per_tensor: int = 1024) -> str:
    """Hash evenly spaced entries of every parameter: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        chosen = flat[:: math.ceil(max(len(flat), 1) / per_tensor)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()[:16]
