"""Of which model, and made with what: what a number needs to be believed later."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unlearn_llm.encode import Encoder
from unlearn_llm.scoring import unwrapped

PACKAGES = ("unlearn_llm", "transformers", "torch", "rouge-score", "scipy")
NOT_THE_MODEL = {
    *("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version"),
    *("architectures", "dtype", "use_cache", "inference_mode"),
}
"""Settings that say where a model came from or what saving and training made of its settings, and
not what it computes. The weights' own precision is hashed with them."""


NOT_MERGED = "not merged: with it switched off, its base model answers as it always did"


def versions() -> dict[str, str]:
    """Give the versions of the packages that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_model(model: nn.Module, encoder: Encoder) -> dict[str, Any]:
    """Name a model and how it is asked, with fingerprints of the model and of the tokenizer."""
    inner = unwrapped(model)
    path = str(inner.config.name_or_path)
    return {
        # A folder's own name only: results travel, and the folders of one machine stay at home.
        "name": Path(path).name if Path(path).is_dir() else path,
        "type": inner.config.model_type,
        "parameters": sum(_size(parameter) for parameter in model.parameters()),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        **describe_encoder(encoder),
        **({"adapter": NOT_MERGED} if isinstance(model, PeftModel) else {}),
    }


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """Say how texts become tokens."""
    template = encoder.template
    return {
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "template": template if isinstance(template, str) else asdict(template),
        "system": encoder.system,
        "date": encoder.date,
        "max_length": encoder.max_length,
        "truncate": encoder.truncate,
    }


def fingerprint(model: nn.Module) -> str:
    """Hash every weight of a model, its settings and those of its adapter: 16 hexadecimal digits.

    Weights are hashed in the form they are held in, so that quantising them changes it, too. It
    takes about a second for every 2 GB and core.
    """
    inner = unwrapped(model)
    settings = [inner.config.to_dict()]
    if isinstance(model, PeftModel):
        settings += [model.peft_config[name].to_dict() for name in model.active_adapters]
    digest = hashlib.sha256(_settled(settings))
    state = model.state_dict()
    parts = [(name, part) for name, value in state.items() for part in _tensors(value)]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock alone
        for (name, part), hashed in zip(
            parts, pool.map(_hash, [part for _, part in parts]), strict=True
        ):
            digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode() + hashed)
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what makes tokens of texts and texts of tokens: 16 hexadecimal digits."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    content = [
        rules.to_str() if rules is not None else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    ]
    return hashlib.sha256(_settled(content)).hexdigest()[:16]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a weight is held in."""
    if hasattr(value, "__tensor_flatten__"):  # torchao's quantised weights
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def _hash(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).digest()


def _size(parameter: Any) -> int:
    """Count the weights that a tensor stands for; bitsandbytes keeps two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def _settled(settings: Any) -> bytes:
    """Settings as bytes that do not change from one process to another."""

    def plain(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, set) else str(value)

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): known(v) for k, v in value.items() if k not in NOT_THE_MODEL}
        return [known(v) for v in value] if isinstance(value, list) else value

    return json.dumps(known(settings), sort_keys=True, default=plain).encode()
