"""Can a model be loaded? Found from its folder and the heads of its files, before a weight is read.

Faults of what is on the hub, or comes with code of its own, show when it is loaded.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from unlearn_llm.errors import UserError
from unlearn_llm.models import ModelSettings, adapter_config, add_lora, is_adapter, model_config

logger = logging.getLogger(__name__)
FETCH = "Fetch or save it anew."
Shapes = dict[str, tuple[str, list[int]]]
"""Dtype ("F32") and shape of every tensor of a model's files."""


def check_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose files are not whole, or do not fit its settings or its tokenizer.

    Raises:
        UserError: naming the folder or file, and what to do.
    """
    folder = Path(str(settings.path)).expanduser()
    if not folder.is_dir():
        return
    if is_adapter(settings):
        base = _check_adapter(settings)
        if Path(str(base)).expanduser().is_dir():  # its tokenizer may be larger: adapters add words
            _check_folder(ModelSettings(path=base, dtype=settings.dtype))
        return
    _check_folder(settings)
    known = getattr(model_config(settings).get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if known is not None and largest >= known:
        raise UserError(
            f"model.path: {settings.path} has embeddings for {known} tokens, but its tokenizer "
            f"knows a token {largest}. Give the tokenizer that belongs to it (model.tokenizer)."
        )


def _check_adapter(settings: ModelSettings) -> str:
    """Check an adapter's files; give the path of its base."""
    folder = Path(str(settings.path)).expanduser()
    base = adapter_config(settings).base_model_name_or_path
    where = f"model.path: {folder / 'adapter_config.json'}"
    if not base:
        raise UserError(f"{where} names no base model; set base_model_name_or_path in it.")
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1
    if looks_local and not Path(base).expanduser().is_dir():
        raise UserError(
            f"{where}: there is no folder {base} with the base model; correct "
            "base_model_name_or_path in it."
        )
    _check_present(folder, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
    _read_heads(folder / ADAPTER_SAFE_WEIGHTS_NAME)
    return base


def _check_folder(settings: ModelSettings) -> None:
    folder, config = Path(str(settings.path)).expanduser(), model_config(settings)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        if settings.extra.get("use_safetensors") is False:
            return  # asked for a pickle
        _check_present(folder, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        files = [folder / SAFE_WEIGHTS_NAME]
    else:
        files = _shards(index)
    shapes: Shapes = {}
    for file in files:
        shapes |= _read_heads(file)
    if getattr(config, "quantization_config", None) is None:
        _check_fits(settings, config, shapes, folder)


def _check_present(folder: Path, wanted: str, *pickles: str) -> None:
    if (folder / wanted).is_file():
        return
    pickle = next((name for name in pickles if (folder / name).is_file()), None)
    if pickle is not None:
        raise UserError(
            f"model.path: {folder} has its weights in {pickle} only, a pickle, which may run code "
            "when it is read. Load it where you trust it and write it with save_pretrained, "
            f"which makes {wanted}."
        )
    raise UserError(f"model.path: {folder} holds no weights, expected {wanted}. {FETCH}")


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [index.parent / str(name) for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"model.path: {index} cannot be read. {FETCH}") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"model.path: {index.parent} lacks {len(missing)} of {len(shards)} files of weights: "
            f"{', '.join(missing[:3])}. Fetch them, or save the model anew."
        )
    return shards


def _read_heads(file: Path) -> Shapes:
    """Read names, dtypes and shapes; the library compares the file's length with them."""
    file.open("rb").close()  # the library calls a file that may not be read a missing one
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.path: {file} is not whole: {error}. {FETCH}") from error


def _check_fits(settings: ModelSettings, config: Any, shapes: Shapes, folder: Path) -> None:
    """Compare the files with a model of these settings that has no weights yet."""
    made = _without_weights(settings, config)
    for name, expected in made.items():
        if name not in shapes:
            continue  # tied, new, or called otherwise in files
        dtype, shape = shapes[name]
        if shape != list(expected.shape):
            raise UserError(
                f"model.path: {folder}: {name} has the shape {shape}, but config.json makes it "
                f"{list(expected.shape)}. Give weights and config.json of one model."
            )
        if expected.is_floating_point() and dtype.startswith(("I", "U", "BOOL")):
            raise UserError(
                f"model.path: {folder}, model.safetensors: {name} holds {dtype}, expected floating "
                "point numbers (F32, BF16, F16). Save the model in one of these."
            )


def _without_weights(settings: ModelSettings, config: Any) -> Mapping[str, torch.Tensor]:
    if settings.trust_remote_code or settings.extra:
        return {}
    attention = {"attn_implementation": settings.attention} if settings.attention else {}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **attention)
    except (ImportError, ValueError) as error:
        problem = " ".join(str(error).split())
        if settings.attention is not None:
            raise UserError(
                f"model.attention: {settings.attention!r} cannot be used: {problem} sdpa and eager "
                "always can."
            ) from error
        return {}  # loading says more
    except Exception as error:  # models that need real numbers to be made
        logger.debug(f"{settings.path} is not made without weights: {error}")
        return {}
    found = dict(model.state_dict())
    if settings.lora is not None:
        add_lora(model, settings.lora)
    return found
