"""Rounding the weights to 8 and 4 bits: small updates disappear, what they hid comes back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_llm.attacks.asking import recalls
from unlearn_llm.attacks.base import Material, NotMeasured, Subject, Trial, attack

Rounding = Callable[[Tensor], Tensor]


@attack("quantisation")
def quantisation(
    subject: Subject, material: Material, *, formats: Sequence[str] = ("int8", "nf4", "fp4")
) -> list[Trial]:
    """Ask the plain questions of the model with rounded weights.

    The linear layers but the output head are rounded, as transformers does when it loads a model
    with bitsandbytes. The weights are held as floats again afterwards, so that every device and
    kind of layer computes with them.

    Source: Zhang et al. 2025, arXiv:2410.16454; bitsandbytes LLM.int8 and nf4/fp4 in blocks of
        64. Differs: activations are not rounded (LLM.int8 does that, too).
    """
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise NotMeasured("needs bitsandbytes: pip install 'unlearn_llm[attacks]'") from error
    roundings: dict[str, Rounding] = {"int8": int8, "nf4": four_bit("nf4"), "fp4": four_bit("fp4")}
    trials = []
    for name in formats:
        if name not in roundings:
            raise NotMeasured(f"quantisation.formats knows {', '.join(roundings)}, not {name!r}")
        model = subject.fresh().eval()
        round_weights(model, roundings[name])
        trials.append(Trial(f"quantisation {name}", recalls(subject, material.forget, model=model)))
    return trials


def round_weights(model: Any, rounding: Rounding) -> None:
    """Round the weights of the linear layers in place; not the output head's."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            with torch.no_grad():
                module.weight.copy_(rounding(module.weight.detach()))


def int8(weight: Tensor) -> Tensor:
    """Round each row of (out, in) to 8 bits of its largest entry, as LLM.int8 holds it."""
    from bitsandbytes import functional

    codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return codes.to(weight.dtype) * (largest / 127.0).to(weight.dtype)[:, None]


def four_bit(kind: str) -> Rounding:
    """Give the rounding to 4-bit codes of a kind, with one scale per 64 entries."""

    def rounded(weight: Tensor) -> Tensor:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type=kind)
        return functional.dequantize_4bit(codes, state).to(weight.dtype)

    return rounded
