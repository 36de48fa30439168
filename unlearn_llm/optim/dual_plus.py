"""DualOptim+: DualAdamW with a base that the roles share."""

from typing import Any, ClassVar, Literal, get_args

from unlearn_llm.optim.dual import (
    DualAdamW,
    Params,
    Rounding,
    check_betas,
    check_choice,
    role_lr,
)
from unlearn_llm.optim.update import BaseOrder, Coefficients, coefficients
from unlearn_llm.types import ROLES

Quantize = Literal["all", "base", "delta"]


class DualAdamWPlus(DualAdamW):
    """DualOptim+: AdamW with moments split into a shared base and one delta per role.

    Args:
        base_betas: Decay of the base's first and second moment.
        base_order: "lagged" (as released) or "base_first"; see `update.dual_plus_update`.
        max_update: Bound on |step| / lr of every entry, where base and delta cancel; None: none,
            as released.
        quantize: With 8 bits, what is kept in them: "all", "base" or "delta".

    The other arguments are those of DualAdamW; `betas` are the deltas'.

    Raises:
        ValueError: An argument out of its range.

    Source: `update.dual_plus_update`; 8 bits as in CityU-MLO/DualOptimPlus@b370724
        trainer/custom_optimizer_plus.py. Differs: see `storage.can_quantize`.
    """

    _owners: ClassVar[tuple[str, ...]] = (*ROLES, "base")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        forget_lr_scale: float = 1.0,
        base_betas: tuple[float, float] = (0.9, 0.95),
        base_order: BaseOrder = "lagged",
        max_update: float | None = None,
        state_bits: int = 32,
        quantize: Quantize = "all",
        min_8bit_size: int = 4096,
        rounding: Rounding = "nearest",
        refuse_nonfinite: bool = True,
        compile: bool | None = None,
    ) -> None:
        check_betas("base_betas", base_betas)
        check_choice("base_order", base_order, get_args(BaseOrder))
        check_choice("quantize", quantize, get_args(Quantize))
        if max_update is not None and not max_update > 0:
            raise ValueError(f"max_update: expected a number above 0, or None, got {max_update!r}.")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            forget_lr_scale=forget_lr_scale,
            state_bits=state_bits,
            min_8bit_size=min_8bit_size,
            rounding=rounding,
            refuse_nonfinite=refuse_nonfinite,
            compile=compile,
        )
        own = {
            "base_betas": base_betas,
            "base_order": base_order,
            "max_update": max_update,
            "quantize": quantize,
        }
        self.defaults.update(own)
        for group in self.param_groups:
            for name, value in own.items():
                group.setdefault(name, value)

    def _quantizes(self, owner: str, group: dict[str, Any]) -> bool:
        part = "base" if owner == "base" else "delta"
        return group["quantize"] in ("all", part)

    def _coefficients(self, group: dict[str, Any], role_step: int, total_step: int) -> Coefficients:
        return coefficients(
            lr=role_lr(group),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            betas=group["betas"],
            role_step=role_step,
            base_betas=group["base_betas"],
            total_step=total_step,
            base_order=group["base_order"],
        )
