"""Models and tokenizers: from a folder or the hub, with adapters, or new and small."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.four_bit import FourBit, compute_plainly

logger = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoraSettings:
    """A fresh LoRA adapter (peft.LoraConfig)."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"


@dataclass(frozen=True)
class NewModel:
    """A small model with random weights, and a BPE tokenizer trained on the run's own text."""

    family: Literal["llama", "phi"] = "llama"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    context: int = 512


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is loaded."""

    path: str | None = None
    """Local folder or hub id."""
    continued: bool = False
    """`path` is a finished run of `unlearn train`, and this run the next request: what was
    forgotten before is kept out of the retain set (`unlearn train --continue-from RUN`)."""
    tokenizer: str | None = None
    """Take the tokenizer from this folder or hub id; null: from `path`."""
    new: NewModel | None = None
    """Instead of `path`: start from random weights (for `unlearn finetune`)."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory; trainable ones are kept in float32 while they train."""
    attention: str | None = None
    """attn_implementation of transformers: sdpa, eager, flash_attention_2."""
    lora: LoraSettings | None = None
    adapter: str | None = None
    """Folder of a peft adapter of the model at `path`; it is put on it and trained further."""
    four_bit: FourBit | None = None
    """Hold the weights under an adapter in 4 bits (QLoRA); {}: nf4, as published."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of from_pretrained."""


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; give it a pad token where it has none.

    The pad token may be the end token: padding is marked by position, never by id.
    """
    if settings.tokenizer is not None:
        settings = replace(settings, path=settings.tokenizer, revision=None)
    tokenizer = _from_pretrained(
        AutoTokenizer.from_pretrained,
        settings,
        what="the tokenizer (tokenizer.json, tokenizer_config.json) of ",
        trust_remote_code=settings.trust_remote_code,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def context_length(settings: ModelSettings) -> int | None:
    """Say how many tokens the model reads, without loading weights; None if it does not say."""
    if settings.new is not None:
        return settings.new.context
    if is_adapter(settings):
        return None
    found: int | None = model_config(settings).to_dict().get("max_position_embeddings")
    return found


def model_config(settings: ModelSettings) -> Any:
    """Read the config.json of a model."""
    return _from_pretrained(
        AutoConfig.from_pretrained,
        settings,
        what="config.json of ",
        trust_remote_code=settings.trust_remote_code,
    )


def is_adapter(settings: ModelSettings) -> bool:
    """Is the model a folder with a peft adapter?"""
    return bool(settings.path) and (Path(str(settings.path)) / ADAPTER_CONFIG).is_file()


def base_and_adapter(settings: ModelSettings) -> tuple[ModelSettings, ModelSettings | None]:
    """Take apart what is loaded first, and the adapter that is put on it, if there is one."""
    if settings.adapter is not None:
        adapter = ModelSettings(path=settings.adapter)
        if not is_adapter(adapter):
            raise UserError(f"model.adapter: {settings.adapter} holds no {ADAPTER_CONFIG}.")
        if is_adapter(settings):
            raise UserError(
                f"model.path: {settings.path} is an adapter itself; give the base model of "
                "model.adapter, or leave model.adapter out."
            )
        if settings.lora is not None:
            raise UserError("model.lora is a fresh adapter, model.adapter one to train further.")
        return replace(settings, adapter=None), adapter
    if not is_adapter(settings):
        return settings, None
    config = adapter_config(settings)
    base = ModelSettings(
        path=config.base_model_name_or_path,
        revision=config.revision,
        dtype=settings.dtype,
        four_bit=settings.four_bit,
        trust_remote_code=settings.trust_remote_code,
    )
    return base, settings


def load_model(settings: ModelSettings) -> PreTrainedModel:
    """Load a causal language model, with a fresh adapter if asked for.

    A folder with a peft adapter gives the base model with that adapter, trainable; so does
    `settings.adapter` on the model at `settings.path`. Weights are read from safetensors; a pickle
    only where `extra` has use_safetensors: false.
    """
    in_four_bit = settings.four_bit.keywords(PartialState().device) if settings.four_bit else {}
    if is_adapter(settings) and settings.adapter is None:
        from peft import AutoPeftModelForCausalLM

        _check_adapter(settings)
        model = _from_pretrained(
            AutoPeftModelForCausalLM.from_pretrained,
            settings,
            is_trainable=True,
            dtype=DTYPES.get(settings.dtype, "auto"),
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            **in_four_bit,
        )
        compute_plainly(model)
        return model
    base, adapter = base_and_adapter(settings)
    model = _from_pretrained(
        AutoModelForCausalLM.from_pretrained,
        base,
        dtype=DTYPES.get(settings.dtype, "auto"),
        trust_remote_code=settings.trust_remote_code,
        **({"attn_implementation": settings.attention} if settings.attention else {}),
        **{"use_safetensors": True, **settings.extra},
        **in_four_bit,
    )
    compute_plainly(model)
    if adapter is not None:
        trained_on = str(adapter_config(adapter).base_model_name_or_path)
        if Path(trained_on).expanduser().resolve() != Path(str(base.path)).expanduser().resolve():
            logger.warning(f"{adapter.path} was trained on {trained_on}, now it is on {base.path}.")
        model = attach_adapter(model, adapter)
    if settings.lora is not None:
        model = add_lora(model, settings.lora)
    return model


def adapter_config(settings: ModelSettings) -> PeftConfig:
    """Read what an adapter's folder says about it."""
    config: PeftConfig = _from_pretrained(
        PeftConfig.from_pretrained, settings, what="adapter_config.json (peft_type ...) of "
    )
    return config


def attach_adapter(base: torch.nn.Module, settings: ModelSettings) -> Any:
    """Put the adapter of a folder onto its base model, which is in memory already; trainable."""
    _check_adapter(settings)

    def load(*given: Any, **keywords: Any) -> Any:
        try:
            return PeftModelForCausalLM.from_pretrained(base, *given, **keywords)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise UserError(
                f"The adapter {settings.path} does not fit its base model. Give the model that it "
                "was trained on."
            ) from error

    return _from_pretrained(load, settings, is_trainable=True)


def add_lora(model: PreTrainedModel, lora: LoraSettings) -> Any:
    """Wrap a model in a fresh LoRA adapter; only the adapter trains."""
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
            ),
        )
    except ValueError as error:
        raise UserError(
            f"model.lora: {str(error).splitlines()[0]} Correct lora.r, or lora.target_modules, "
            "such as q_proj, or all-linear."
        ) from error


def new_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with pad, begin and end tokens on some text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    specials = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", specials.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def new_config(new: NewModel, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """Make the config of a new Llama or Phi; without a tokenizer, of the size that is asked for."""
    if new.hidden_size % new.heads:
        raise UserError(
            f"model.new: hidden_size must be a multiple of heads; got {new.hidden_size} and "
            f"{new.heads}."
        )
    tokens = {
        f"{name}_token_id": None if tokenizer is None else getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
    }
    config: PreTrainedConfig = AutoConfig.for_model(
        new.family,
        vocab_size=new.vocabulary if tokenizer is None else len(tokenizer),
        hidden_size=new.hidden_size,
        intermediate_size=4 * new.hidden_size,
        num_hidden_layers=new.layers,
        num_attention_heads=new.heads,
        num_key_value_heads=new.heads,
        max_position_embeddings=new.context,
        tie_word_embeddings=new.family == "llama",
        **tokens,
    )
    return config


def new_model(new: NewModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """Build a Llama or Phi with random weights for this tokenizer."""
    config = new_config(new, tokenizer)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def select_trainable(model: torch.nn.Module, pattern: str | None) -> None:
    """Train only the parameters whose name matches a regular expression; None: as they are."""
    if pattern is None:
        return
    names = {name for name, _ in model.named_parameters() if re.search(pattern, name)}
    if not names:
        known = ", ".join(name for name, _ in list(model.named_parameters())[:5])
        raise UserError(f"trainable: no parameter matches {pattern!r}; names look like {known}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def keep_float32_masters(model: torch.nn.Module, autocast: bool) -> None:
    """Keep trainable weights in float32: in bfloat16 an update of 1e-5 is rounded away.

    Raises:
        UserError: some weights stay frozen in another dtype and nothing converts between them
            (autocast does, and peft's adapters do).
    """
    for parameter in model.parameters():
        low = parameter.dtype in (torch.bfloat16, torch.float16)
        # What ZeRO-3 has spread over the ranks already keeps its masters with the optimiser.
        if parameter.requires_grad and low and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1 and not autocast and not isinstance(model, PeftModel):
        raise UserError(
            "trainable: the weights that train are kept in float32, the frozen ones are "
            f"{', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes - {torch.float32}))}."
            " Set bf16: true, or load the model with dtype: float32."
        )


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        NonFiniteError: naming the first parameter that trains and holds such values.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"Step {step}: {name} holds values that are not finite. "
                "No checkpoint was written; the last good one is kept."
            )


def _check_adapter(settings: ModelSettings) -> None:
    if settings.lora is not None or settings.extra:
        raise UserError(
            f"model.path: {settings.path} is an adapter already; model.lora and model.extra "
            "do not apply to it."
        )
    folder = Path(str(settings.path))
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
        raise UserError(
            f"model.path: {settings.path} holds its adapter in {WEIGHTS_NAME}, a pickle, which may "
            f"run any code. Give it as {SAFETENSORS_WEIGHTS_NAME}."
        )


def _from_pretrained(
    load: Callable[..., Any], settings: ModelSettings, what: str = "", **keywords: Any
) -> Any:
    """Load from a folder or the hub; what goes wrong becomes one line."""
    if settings.path is None:
        raise UserError("model.path is missing: give a local folder or a hub id.")
    folder = Path(settings.path).expanduser()
    looks_local = settings.path.startswith((".", "/", "~")) or settings.path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"model.path: there is no folder {settings.path}.")
    try:
        return load(
            str(folder) if folder.is_dir() else settings.path,
            revision=settings.revision or "main",
            **keywords,
        )
    except UserError:
        raise
    except Exception as error:  # readers of files raise a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        advice = f"Check {'model.extra, ' if settings.extra else ''}the folder or the id."
        raise UserError(
            f"model.path: cannot load {what}{settings.path!r}: {reason}. {advice}"
        ) from error
