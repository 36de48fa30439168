"""Task arithmetic: subtract what fine-tuning on the forget set has added to a model.

theta - alpha (theta_finetuned - theta), tensor by tensor, from safetensors to safetensors: one file
of the result is in memory at a time, never a second model.

Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv:2212.04089, section 3.
Differs: no difference. The paper chooses alpha between 0 and 1 on validation data.
"""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from unlearn_llm.errors import UserError
from unlearn_llm.models import ADAPTER_CONFIG

NOTE = "task_arithmetic.json"
# What stands beside the weights of a model or adapter.
TAKEN_OVER = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
LEFT_OUT = ("trainer_state.json",)
B_MATRICES = ("lora_B.", "lora_embedding_B")
A_MATRICES = ("lora_A.", "lora_embedding_A")


class Weights:
    """The safetensors of a folder, by name and file; nothing is read before it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Open a folder's files until the stack closes.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        self.folder = folder
        self.names: dict[str, list[str]] = {}
        self._file_of: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                opened: Any = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read: {error}.") from error
            self.names[path.name] = list(opened.keys())
            self._file_of |= dict.fromkeys(self.names[path.name], opened)
        if not self.names:
            raise UserError(
                f"{folder} holds no .safetensors. Give a local folder, as `unlearn finetune` "
                "writes it or `hf download` fetches it."
            )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> list[int]:
        """Give a tensor's shape without reading it."""
        shape: list[int] = self._file_of[name].get_slice(name).get_shape()
        return shape


def negate(base: Path, finetuned: Path, output: Path, alpha: float = 1.0) -> None:
    """Write base - alpha (finetuned - base); for an adapter, the adapter times -alpha.

    Differences are taken in float32 and rounded once, to the dtype of the base. Of an adapter the B
    matrices are scaled, and with them the whole of it.

    Args:
        base: Folder of the model before it was fine-tuned on the forget set.
        finetuned: Folder of the model after, or of a LoRA adapter that was trained on the base.
        output: A new folder, for a model or an adapter; it appears whole or not at all.
        alpha: 0 gives the base.

    Raises:
        UserError: folders without safetensors, weights that do not belong together, an output that
            exists, an adapter that is not linear in its B matrices.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a new folder.")
    if not math.isfinite(alpha):
        raise UserError(f"--alpha is {alpha}, expected a finite number such as 1.")
    is_adapter = (finetuned / ADAPTER_CONFIG).is_file()
    with ExitStack() as stack:
        after = Weights(finetuned, stack)
        if is_adapter:
            _check_adapter(after, base)
            before = after
        else:
            before = Weights(base, stack)
            _check_match(before, after)
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = stack.enter_context(TemporaryDirectory(dir=output.parent, prefix=".negate-"))
        made = Path(unfinished) / output.name
        made.mkdir()
        for file, names in tqdm(before.names.items(), desc="negate", unit="file", leave=False):
            if is_adapter:
                tensors = {name: _scaled(name, after[name], -alpha) for name in names}
            else:
                tensors = {name: _moved(before[name], after[name], -alpha) for name in names}
            save_file(tensors, made / file, metadata={"format": "pt"})
            del tensors  # before those of the next file are made
        _take_over(before.folder, made)
        note = {"base": str(base), "finetuned": str(finetuned), "alpha": alpha}
        (made / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
        made.rename(output)


def _moved(before: Tensor, after: Tensor, times: float) -> Tensor:
    """Go `times` the way from before to after; tables of integers stay as they are."""
    if not before.is_floating_point():
        return before
    ours = before.float()
    return (ours + times * (after.float() - ours)).to(before.dtype)


def _scaled(name: str, tensor: Tensor, times: float) -> Tensor:
    is_b = any(part in name for part in B_MATRICES)
    return (times * tensor.float()).to(tensor.dtype) if is_b else tensor


def _check_match(before: Weights, after: Weights) -> None:
    lonely = sorted(set(before) ^ set(after))
    if lonely:
        raise UserError(
            f"{before.folder} and {after.folder} are not the same model: only one of them holds "
            f"{', '.join(lonely[:3])}."
        )
    for name in before:
        if before.shape(name) != after.shape(name):
            raise UserError(
                f"{before.folder} and {after.folder} are not the same model: {name} has the shapes "
                f"{before.shape(name)} and {after.shape(name)}."
            )


def _check_adapter(adapter: Weights, base: Path) -> None:
    config = json.loads((adapter.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    trained_on = str(config.get("base_model_name_or_path"))
    if Path(trained_on).expanduser().resolve() != base.expanduser().resolve():
        raise UserError(f"{adapter.folder} is an adapter of {trained_on}, not of {base}.")
    for name in adapter:
        if not any(part in name for part in (*A_MATRICES, *B_MATRICES)):
            raise UserError(
                f"{adapter.folder}: {name} is no A or B matrix, so the adapter cannot be negated. "
                "Train one without modules_to_save and DoRA, or merge it into the model."
            )


def _take_over(folder: Path, output: Path) -> None:
    """Copy configuration and tokenizer; an index too, because the files keep their names."""
    for pattern in TAKEN_OVER:
        for path in folder.glob(pattern):
            if path.name not in LEFT_OUT:
                shutil.copy2(path, output / path.name)
