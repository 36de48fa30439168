"""Puts requests to a model that vLLM serves, in this process: the same questions, other kernels.

Optional: it needs `vllm`, which brings its own torch. It has been tested with an imitation of
vLLM's interface only.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unlearn_llm.encode import Encoded, Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.generator import read_generation
from unlearn_llm.evaluation.journal import Journal, digest, key_of
from unlearn_llm.evaluation.provenance import describe_encoder
from unlearn_llm.evaluation.requests import (
    Generate,
    LogProb,
    LogProbResult,
    Request,
    Result,
)

CHUNK = 1024
"""Requests of one call, which are kept together. vLLM makes batches of them itself."""


class VllmRunner:
    """Asks one `vllm.LLM`; see Runner. Scores differ from Runner's by the rounding of vLLM."""

    def __init__(
        self,
        llm: Any,
        encoder: Encoder,
        *,
        max_new_tokens: int = 200,
        max_total_tokens: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self.llm = llm
        self.encoder = encoder
        self._config = llm.llm_engine.model_config
        self._max_new_tokens = max_new_tokens
        self._max_total_tokens = max_total_tokens
        self._progress = bool(progress)

    def describe(self) -> dict[str, Any]:
        """Name the model and how it is asked; the weights are those of its folder."""
        folder = Path(str(self._config.model))
        if not folder.is_dir():
            raise UserError(
                f"{folder} is no folder, so its weights cannot be told from others. Give vLLM a "
                "folder with the model."
            )
        hashed = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            with path.open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        return {
            "name": folder.name,
            "type": str(self._config.hf_config.model_type),
            "dtype": str(self._config.dtype).removeprefix("torch."),
            "quantization": self._config.quantization,
            "fingerprint": hashed.hexdigest()[:16],
            **describe_encoder(self.encoder),
        }

    def origin(self, requests: Iterable[Request]) -> dict[str, Any]:
        """Say what answers depend on besides model and tokenizer; see Journal."""
        return {
            "questions": digest([key_of(request) for request in dict.fromkeys(requests)]),
            "max_new_tokens": self._max_new_tokens,
            "max_total_tokens": self._max_total_tokens,
            "engine": f"vllm {importlib.metadata.version('vllm')}",
        }

    def run(
        self, requests: Iterable[Request], journal: Journal | None = None
    ) -> dict[Request, Result]:
        """Answer every distinct request.

        Raises:
            UserError: a question or an answer that cannot be encoded, or a request that vLLM cannot
                answer.
        """
        distinct = list(dict.fromkeys(requests))
        for request in distinct:
            if not isinstance(request, LogProb | Generate):
                raise UserError(
                    f"vLLM gives no answer to {type(request).__name__}, which a metric of the "
                    "suite asks for. Leave that metric out, or evaluate the model itself."
                )
        results = journal.known(distinct) if journal else {}
        scored = [r for r in distinct if isinstance(r, LogProb)]
        asked = [r for r in distinct if isinstance(r, Generate)]
        pairs = self.encoder.pairs([r.question for r in scored], [r.answer for r in scored])
        prompts = self.encoder.prompts([r.question for r in asked]) if asked else []
        open_pairs = [p for p in zip(scored, pairs, strict=True) if p[0] not in results]
        open_prompts = [p for p in zip(asked, prompts, strict=True) if p[0] not in results]
        for ask, missing in ((self._score, open_pairs), (self._go_on, open_prompts)):
            for chunk in _chunks(missing):
                part = ask(chunk)
                if journal:
                    journal.add(part)
                results.update(part)
        return {request: results[request] for request in distinct}

    def _score(self, pairs: Sequence[tuple[LogProb, Encoded]]) -> list[tuple[Request, Result]]:
        # One token must be generated; what counts are the probabilities of the prompt's tokens.
        settings = self._settings(max_tokens=1, prompt_logprobs=1)
        outputs = self._call([encoded.ids for _, encoded in pairs], [settings] * len(pairs))
        return [
            (request, _logprob_result(encoded, output.prompt_logprobs))
            for (request, encoded), output in zip(pairs, outputs, strict=True)
        ]

    def _go_on(self, prompts: Sequence[tuple[Generate, list[int]]]) -> list[tuple[Request, Result]]:
        rooms = [self._room(request, ids) for request, ids in prompts]
        # vLLM refuses prompts that leave no room.
        fitting = [(ids, room) for (_, ids), room in zip(prompts, rooms, strict=True) if room]
        settings = [self._settings(max_tokens=room) for _, room in fitting]
        outputs = iter(self._call([ids for ids, _ in fitting], settings))
        found: list[tuple[Request, Result]] = []
        for (request, _), room in zip(prompts, rooms, strict=True):
            made = next(outputs).outputs[0] if room else None
            ids = list(made.token_ids) if made else []
            finished = made is not None and made.finish_reason == "stop"
            found.append((request, read_generation(ids, finished, self.encoder, request.stop)))
        return found

    def _room(self, request: Generate, ids: Sequence[int]) -> int:
        limits = [self._max_new_tokens, self._config.max_model_len - len(ids)]
        if request.max_new_tokens is not None:
            limits.append(request.max_new_tokens)
        if self._max_total_tokens is not None:
            limits.append(self._max_total_tokens - len(ids))
        return max(0, min(limits))

    def _settings(self, **settings: Any) -> Any:
        from vllm import SamplingParams

        # detokenize: the texts are ours to make. Stop tokens beyond the tokenizer's are the model's
        # own, which vLLM knows.
        stop_ids = [int(self.encoder.tokenizer.eos_token_id)]
        return SamplingParams(
            temperature=0.0, detokenize=False, stop_token_ids=stop_ids, **settings
        )

    def _call(self, prompts: Sequence[list[int]], settings: Sequence[Any]) -> list[Any]:
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self.llm.generate(asked, list(settings), use_tqdm=self._progress))


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    yield from (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


def _logprob_result(encoded: Encoded, of_prompt: Sequence[Any]) -> LogProbResult:
    """Read what vLLM says of every token of a prompt: None for the first, else {id: Logprob}."""
    scored = range(max(1, encoded.n_prompt), len(encoded.ids))
    found = [of_prompt[place][encoded.ids[place]] for place in scored]
    return LogProbResult(tuple(one.logprob for one in found), tuple(one.rank == 1 for one in found))
