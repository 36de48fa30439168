"""The base model in 4 bits, as QLoRA holds it: how it is loaded, and written out again."""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from unlearn_llm.errors import UserError


@dataclass(frozen=True)
class FourBit:
    """Linear layers in bitsandbytes' 4 bits, under an adapter that trains; the head stays as it is.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314; transformers BitsAndBytesConfig.
    Differs: norms and embeddings keep the dtype that they were loaded in, where peft's
        prepare_model_for_kbit_training makes float32 of them; the adapter trains in float32.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    """Keep the scales in 8 bits, too: 4.13 bits per weight instead of 4.5."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the layers multiply in."""

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """Give the arguments of from_pretrained.

        Raises:
            UserError: bitsandbytes is not there.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.four_bit needs bitsandbytes: pip install 'unlearn_llm[qlora]'.")
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )
        # By itself transformers takes a GPU wherever there is one, also for a run with use_cpu.
        return {"quantization_config": config, "device_map": {"": device}}


def compute_plainly(model: nn.Module) -> None:
    """Let 4-bit layers compute in evaluation as they do in training.

    On CPUs with AVX512_BF16 a forward pass in evaluation mode packs their weights anew, for a
    kernel that knows no gradient; whatever trains or is saved afterwards is wrong. An internal
    attribute of bitsandbytes (0.49 to 0.50) prevents that: tests/test_four_bit.py.
    """
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def four_bit_layers(model: nn.Module) -> list[Any]:
    """List the layers of a model that are held in 4 bits."""
    if "bitsandbytes" not in sys.modules:  # its import takes a while
        return []
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def in_float32(model: nn.Module) -> None:
    """Compute in float32 throughout, whatever dtype the weights were loaded in."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in four_bit_layers(model):
        layer.compute_dtype = torch.float32
        layer.weight.quant_state.dtype = torch.float32  # or they are rounded when written out


def written_out(weight: Tensor) -> Tensor:
    """Give a weight as a plain tensor, in the dtype that `in_float32` sets or it was loaded in."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    plain: Tensor = dequantize_4bit(weight.data, state)
    return plain


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Put plain float32 layers in the place of 4-bit layers; the model computes the same."""
    logger = logging.get_logger("transformers.integrations.bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it says of which dtype they are
    try:
        plain: PreTrainedModel = model.dequantize(dtype=torch.float32)
    finally:
        logger.setLevel(before)
    return plain


def merged(model: Any) -> Any:
    """Merge an adapter into its base in memory, written out first where that is in 4 bits.

    peft would round the sum to 4 bits again, and most of the adapter away.
    """
    if not four_bit_layers(model):
        return model.merge_and_unload()
    config, weights = model.active_peft_config, get_peft_model_state_dict(model)
    plain = get_peft_model(dequantized(model.base_model.unload()), config)
    set_peft_model_state_dict(plain, weights)
    return plain.merge_and_unload()
