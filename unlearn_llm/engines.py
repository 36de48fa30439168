"""Weights spread over processes (FSDP2, DeepSpeed ZeRO): recognised, and what they cannot do.

All of it is read off the arguments and the launcher's environment, so it is known before a model is
loaded.
"""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import DistributedType
from transformers import TrainingArguments

from unlearn_llm.errors import UserError

if TYPE_CHECKING:
    from unlearn_llm.combine import Combination
    from unlearn_llm.config import UnlearnConfig
    from unlearn_llm.objective import Objective

USE_DDP = "Launch with recipes/accelerate/ddp.yaml; an adapter (model.lora) takes less memory."


class Engine(NamedTuple):
    """What spreads a run over processes.

    Attributes:
        name: As users call it.
        zero: The stage of DeepSpeed ZeRO; None: it is not DeepSpeed.
        fsdp: The version of FSDP; None: it is not FSDP.
    """

    name: str = "DDP"
    zero: int | None = None
    fsdp: int | None = None

    @property
    def sharded(self) -> bool:
        """Does a process keep only a part of weights, gradients or moments?"""
        return self.zero is not None or self.fsdp is not None


def engine_of(args: TrainingArguments) -> Engine:
    """Recognise the engine of a run; one process counts as DDP.

    Raises:
        UserError: an engine was asked for that would silently not be used.
    """
    plugin, fsdp = args.deepspeed_plugin, _fsdp_version(args)
    if plugin is None and fsdp is None:
        return Engine()
    found = (
        Engine(f"FSDP{fsdp}", fsdp=fsdp)
        if plugin is None
        else Engine(f"DeepSpeed ZeRO-{plugin.zero_stage}", zero=int(plugin.zero_stage))
    )
    assert args.distributed_state is not None
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        # accelerate's silence: every process would train the whole model.
        raise UserError(
            f"{found.name} was asked for, but accelerate does not use it on a CPU (train.use_cpu) "
            "or without a launcher. Launch with recipes/accelerate/ddp.yaml, or on GPUs."
        )
    return found


def check_engine(
    args: "UnlearnConfig",
    objective: "Objective",
    *,
    combination: "Combination",
    combine: str | None = None,
    mask: str | None = None,
    four_bit: bool = False,
) -> None:
    """Refuse what an engine that spreads the weights cannot do.

    Args:
        combine, mask: What they are called in messages; None: there is none.
        four_bit: See check_kind.

    Raises:
        UserError: in one line, with what does work.
    """
    engine = check_kind(args, four_bit=four_bit)
    if not engine.sharded:
        return
    _check_optimizer(args, engine)
    _check_objective(args, objective, engine)
    if combine is not None and engine.zero is not None:
        raise UserError(
            f"combine: {combine} needs each parameter's gradient, which {engine.name} keeps in "
            "flat buffers of its own. Launch with recipes/accelerate/fsdp2.yaml or ddp.yaml."
        )
    if combine is not None and not combination.sharded:
        raise UserError(
            f"combine: {combine} keeps a memory of whole gradients, which does not work with "
            f"weights spread over the ranks ({engine.name}). {USE_DDP}"
        )
    if mask is not None:
        raise UserError(
            f"mask: {mask} holds entries of whole parameters, which does not work with weights "
            f"spread over the ranks ({engine.name}). {USE_DDP}"
        )
    if args.eval_strategy != "no" or args.eval_on_start:
        raise UserError(
            f"train.eval_strategy: the weights are spread over the ranks ({engine.name}), and a "
            "suite needs them whole. Set it to 'no', save checkpoints, and give them to "
            "`unlearn eval`."
        )


def check_kind(args: TrainingArguments, *, four_bit: bool = False) -> Engine:
    """Refuse engines that were never tried, and those that could not save the model.

    Args:
        four_bit: Is the base model held in 4 bits?

    Returns:
        The engine.

    Raises:
        UserError: in one line, with what does work.
    """
    engine = engine_of(args)
    if not engine.sharded:
        return engine
    if four_bit:
        raise UserError(
            f"model.four_bit: weights in 4 bits were never spread over ranks ({engine.name}). "
            "Launch with recipes/accelerate/ddp.yaml, or set model.four_bit=null."
        )
    if engine.fsdp == 1:
        raise UserError(
            "FSDP1 is not supported, for it flattens parameters. Use fsdp_version: 2 "
            "(recipes/accelerate/fsdp2.yaml)."
        )
    if engine.zero is None:
        offloads = _says_yes("FSDP_OFFLOAD_PARAMS") or bool(
            (args.fsdp_plugin_args or {}).get("cpu_offload")
        )
    else:
        zero = _deepspeed(args).get("zero_optimization", {})
        offloads = any(
            (zero.get(what) or {}).get("device") not in (None, "none")
            for what in ("offload_optimizer", "offload_param")
        )
        if engine.zero == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise UserError(
                "DeepSpeed ZeRO-3 saves a model only with zero3_save_16bit_model: true "
                "(stage3_gather_16bit_weights_on_model_save in DeepSpeed's own file)."
            )
    if offloads:
        raise UserError(
            f"{engine.name}: offloading to the CPU is not supported. Set it to none (see "
            "recipes/accelerate), or train an adapter (model.lora)."
        )
    return engine


def _check_optimizer(args: "UnlearnConfig", engine: Engine) -> None:
    if engine.zero is not None and args.optimizer_parameters.get("state_bits", 32) == 8:
        raise UserError(
            f"optimizer_parameters: state_bits: 8 does not work under {engine.name}, which "
            "flattens parameters. Launch with recipes/accelerate/fsdp2.yaml or ddp.yaml, or use 32."
        )
    if engine.zero is not None and "optimizer" in _deepspeed(args):
        raise UserError(
            "DeepSpeed's file names an optimizer, which would take the place of the recipe's. Take "
            "it out of that file."
        )
    optim = str(getattr(args.optim, "value", args.optim))
    from_bitsandbytes = any(word in optim for word in ("8bit", "paged")) and "torch" not in optim
    if engine.fsdp is not None and args.optimizer is None and from_bitsandbytes:
        raise UserError(
            f"train.optim: {optim} is of bitsandbytes, which does not step shards (FSDP2). Use "
            "optimizer: dual_adamw_plus with state_bits: 8, or optim: adamw_torch."
        )


def _check_objective(args: "UnlearnConfig", objective: "Objective", engine: Engine) -> None:
    for loss in (objective.forget, objective.retain):
        whole = loss.reference not in (None, "logp") or (
            loss.reference is not None and args.reference in ("adapter", "frozen")
        )
        if whole:
            raise UserError(
                f"{objective.name}: {loss.name} compares with a whole reference model, which does "
                f"not work with weights spread over the ranks ({engine.name}); log-probabilities "
                f"alone do (npo+gd, dpo+gd, reference: auto). {USE_DDP}"
            )
        if loss.layers:
            raise UserError(
                f"{objective.name}: {loss.name} reads hidden states, which does not work with "
                f"weights spread over the ranks ({engine.name}). {USE_DDP}"
            )


def _fsdp_version(args: TrainingArguments) -> int | None:
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args.get("fsdp_version", 1))
    return int(os.environ.get("FSDP_VERSION", "1")) if _says_yes("ACCELERATE_USE_FSDP") else None


def _deepspeed(args: TrainingArguments) -> dict[str, Any]:
    """DeepSpeed's settings, wherever they came from."""
    config: dict[str, Any] = args.deepspeed_plugin.hf_ds_config.config
    return config


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
