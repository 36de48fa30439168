"""A recipe's model without its weights: from config.json alone, on fake tensors."""

from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from unlearn_llm.errors import UserError
from unlearn_llm.models import (
    DTYPES,
    ModelSettings,
    adapter_config,
    add_lora,
    base_and_adapter,
    keep_float32_masters,
    model_config,
    new_config,
    select_trainable,
)


def contentless(
    settings: ModelSettings,
    mode: FakeTensorMode,
    *,
    trainable: str | None = None,
    bf16: bool = False,
    checkpointing: bool = False,
    masters: bool = True,
) -> nn.Module:
    """Make the model as it trains, of fake tensors.

    Args:
        mode: What the tensors are made under.
        masters: Are weights that train kept in float32?

    Raises:
        UserError: there is no config.json, or no model can be made of it.
    """
    if settings.four_bit is not None:
        raise UserError(
            "model.four_bit: 4-bit weights cannot be planned; without it the plan is too large."
        )
    base, trained = (settings, None) if settings.new is not None else base_and_adapter(settings)
    adapter = None if trained is None else adapter_config(trained)
    with torch.device("meta"):
        model: Any = _from_config(base)
        if adapter is not None:
            adapter.inference_mode = False
            model = get_peft_model(model, adapter)
        elif settings.lora is not None:
            model = add_lora(model, settings.lora)
    model.train()
    select_trainable(model, trainable)
    if masters:
        keep_float32_masters(model, autocast=bf16)
    if checkpointing:
        model.activation_checkpointing_enable()
        if adapter is not None or settings.lora is not None:
            model.enable_input_require_grads()
    _make_fake(model, mode)
    return model


def _from_config(settings: ModelSettings) -> Any:
    if settings.new is not None:
        return AutoModelForCausalLM.from_config(new_config(settings.new), dtype=torch.float32)
    config = model_config(settings)
    dtype = DTYPES.get(settings.dtype) or config.dtype or torch.float32
    attention = {"attn_implementation": settings.attention} if settings.attention else {}
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, trust_remote_code=settings.trust_remote_code, **attention
    )


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of meta tensors; what is tied stays tied."""
    made: dict[torch.Tensor, Any] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        made[tensor] = (
                            nn.Parameter(fake, requires_grad=tensor.requires_grad)
                            if tensors is module._parameters
                            else fake
                        )
                    tensors[name] = made[tensor]
