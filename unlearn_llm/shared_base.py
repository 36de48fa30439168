"""Many models one after the other, with adapters of one base taking it from memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from unlearn_llm.evaluation.provenance import fingerprint
from unlearn_llm.models import (
    ModelSettings,
    attach_adapter,
    base_and_adapter,
    load_model,
    load_tokenizer,
)


class SharedBase:
    """Loads models one at a time; what it gave last may no longer be used after the next load.

    The base of the last adapter stays in memory, without it. The next model takes it if it is that
    base, or another adapter of it; its scores are bitwise those of the model loaded by itself.
    An adapter that changed its base (trained biases, PiSSA) leaves nothing to share.
    """

    def __init__(self) -> None:
        self._base: Any = None
        self._settings: ModelSettings | None = None
        self._fingerprint = ""
        self._adapted: Any = None

    def load(self, settings: ModelSettings) -> nn.Module:
        """Give a model as `load_model` does.

        Raises:
            UserError: it cannot be loaded.
        """
        wanted = base_of(settings)
        self._take_off()
        if self._base is None or wanted != self._settings:
            self._base = None  # before the next one needs its memory
            self._base, self._settings = load_model(wanted), wanted
            self._fingerprint = fingerprint(self._base)
        _, adapter = base_and_adapter(settings)
        if adapter is None:
            model: nn.Module = self._base
            return model
        vocabulary = self._base.get_input_embeddings().weight.shape[0]
        if len(load_tokenizer(settings)) > vocabulary:
            self._base = None  # new tokens make the embeddings larger, for this adapter alone
            return load_model(settings)
        adapted: nn.Module = attach_adapter(self._base, adapter)
        self._adapted = adapted
        return adapted

    def _take_off(self) -> None:
        """Remove the adapter from the base; keep the base only if that left it as it was."""
        if self._adapted is None:
            return
        tuner, self._adapted = self._adapted.base_model, None
        if hasattr(tuner, "unload"):  # what only adds prompts wraps no layer
            tuner.unload()
        if self._base is not None and fingerprint(self._base) != self._fingerprint:
            self._base = None


def base_of(settings: ModelSettings) -> ModelSettings:
    """Say what is loaded first: an adapter's base model, or the model itself.

    Folders are resolved, so that equal settings mean the same weights.
    """
    settings, _ = base_and_adapter(settings)
    folder = Path(settings.path or "").expanduser()
    path = str(folder.resolve()) if settings.path and folder.is_dir() else settings.path
    return replace(settings, path=path, tokenizer=None)
