"""One model of an adapter and its base: `unlearn merge`, and its proof.

An adapter that is not merged leaves its base model as it was, with all that it knew, and can be
switched off by whoever has it.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_llm.checkpoints import commit
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import write_json
from unlearn_llm.four_bit import dequantized, in_float32, written_out
from unlearn_llm.models import (
    ModelSettings,
    adapter_config,
    attach_adapter,
    base_and_adapter,
    load_model,
    load_tokenizer,
)
from unlearn_llm.scoring import unwrapped

NOTE = "merge.json"
MOST = 1e-3
"""How far a logit of the merged model may be from the adapter's, in float32."""
SEQUENCES, TOKENS = 4, 64


class Merged(NamedTuple):
    """What a merge did.

    Attributes:
        changed: Names of the weights that the adapter changed.
        weights: How many there are.
        in_memory, reloaded: Largest difference of a logit from the adapter's.
    """

    changed: list[str]
    weights: int
    in_memory: float
    reloaded: float


def merge(settings: ModelSettings, output: Path, files: Mapping[str, str] = {}) -> Merged:
    """Write the model that an adapter makes of its base, in float32, once it has been checked.

    Of a base in 4 bits the weights are written out as the adapter trained on them, not as they were
    before they were rounded: on those it was never measured.

    Checked is, by SHA-256, that weights have changed, and, on random tokens, that every logit is
    the adapter's to `MOST`: in memory, and again when the model has been read from the disk.

    Args:
        settings: Of the adapter; see models.base_and_adapter.
        output: A new folder; it appears whole or not at all.
        files: Texts that are put into it, by name.

    Raises:
        UserError: nothing to merge, an output that exists, a check that failed.

    Source: peft merge_and_unload. Differs: it merges into 4 bits, and rounds the adapter away.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a new folder.")
    base_settings, adapter = base_and_adapter(settings)
    if adapter is None:
        raise UserError(f"{settings.path} is no adapter: there is nothing to merge.")
    if adapter_config(adapter).is_prompt_learning:
        raise UserError(f"{adapter.path} adds prompts; no weights of a model do the same.")
    tokenizer = load_tokenizer(settings)
    base = load_model(base_settings)
    in_float32(base)
    _widen(base, len(tokenizer))
    before = weight_sums(base)
    model = attach_adapter(base, adapter)
    wanted = logits(model)
    if settings.four_bit is not None:
        model = attach_adapter(dequantized(model.base_model.unload()), adapter)
    merged = model.merge_and_unload(safe_merge=True)
    after = weight_sums(merged)
    changed = _changed(before, after, settings)
    in_memory = _check(merged, wanted, "The merged model")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".merge-") as unfinished:
        made = Path(unfinished) / output.name
        merged.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
        del base, model, merged  # before the second one needs the memory
        again = load_model(
            ModelSettings(path=str(made), trust_remote_code=settings.trust_remote_code)
        )
        reloaded = _check(again, wanted, "The model read from the disk again")
        if weight_sums(again) != after:
            raise UserError("The weights read from the disk are not those that were written.")
        result = Merged(changed, len(after), in_memory, reloaded)
        write_json(made / NOTE, _note(settings, base_settings, adapter, before, after, result))
        commit(made, output)
    return result


def weight_sums(model: nn.Module) -> dict[str, str]:
    """Give the SHA-256 of every weight of a model, by name; of 4 bits as they are written out."""
    return {name: _sha256(written_out(weight)) for name, weight in model.named_parameters()}


def logits(model: Any) -> Tensor:
    """Give a model's float32 logits of random tokens, the same for every model: (4, T, V)."""
    inner = unwrapped(model)
    context = inner.config.to_dict().get("max_position_embeddings") or TOKENS
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, min(TOKENS, int(context)))
    ids = torch.randint(int(inner.config.vocab_size), shape, generator=generator)
    with torch.no_grad():
        found: Tensor = model.eval()(ids.to(inner.device)).logits.float().cpu()
    return found


def _sha256(weight: Tensor) -> str:
    plain = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def _widen(base: Any, vocabulary: int) -> None:
    """Make room for tokens that came with the adapter, as peft does when it loads one."""
    if vocabulary > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(vocabulary)


def _changed(
    before: Mapping[str, str], after: Mapping[str, str], settings: ModelSettings
) -> list[str]:
    lonely = sorted(before.keys() ^ after.keys())
    if lonely:
        raise UserError(
            f"The merged model would have other weights than its base: {', '.join(lonely[:3])}. "
            "Layers that share their weight (tied embeddings) cannot be merged apart."
        )
    changed = [name for name in after if after[name] != before[name]]
    if not changed:
        raise UserError(
            f"{settings.adapter or settings.path} changes no weight of its base: it was not "
            "trained, or its changes are too small for float32. Nothing was written."
        )
    return changed


def _check(model: nn.Module, wanted: Tensor, which: str) -> float:
    difference = float((logits(model) - wanted).abs().max())
    if not difference <= MOST:  # not a number fails, too
        raise UserError(
            f"{which} does not compute what the adapter computes: a logit is {difference:.3g} "
            f"away, at most {MOST:g} is allowed. Nothing was written."
        )
    return difference


def _note(
    settings: ModelSettings,
    base: ModelSettings,
    adapter: ModelSettings,
    before: Mapping[str, str],
    after: Mapping[str, str],
    result: Merged,
) -> dict[str, Any]:
    """Say what was merged; folders by their own name only, for models travel."""
    return {
        "base": Path(str(base.path)).name if Path(str(base.path)).is_dir() else base.path,
        "adapter": Path(str(adapter.path)).name,
        "four_bit": asdict(settings.four_bit) if settings.four_bit else None,
        "dtype": "float32",
        "largest_logit_difference": {"in_memory": result.in_memory, "reloaded": result.reloaded},
        "weights": result.weights,
        "changed": {name: [before[name], after[name]] for name in result.changed},
        "versions": {n: importlib.metadata.version(n) for n in ("peft", "transformers", "torch")},
    }
