"""The whole TOFU evaluation: the published procedure, written out, against the package's.

    python benchmarks/evaluation.py --tofu FOLDER [--model FOLDER] [--rounds 1] [--limit 300]

Published: every question with every kind of answer in a pass of its own, batches of 30 in the
order of the data, padded to a constant length, logits of all positions; generation by `generate`,
batch by batch, each until its last row has ended. Ours: `evaluate` with the suite `tofu`, files and
all. Both ask the same model, without judges (which would cost the same), and compute the same
scores. Time is process time on one thread, in turn.

One thing is not as published: generation stops after so many new tokens as the longest of all
prompts leaves room for. The authors count from the longest prompt of each batch.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.models import NewModel, new_model, new_tokenizer

BATCH = 30
# The template "plain". The published code counts the tokens of the question's part, which must not
# end within a token; so the blank stands before the answer.
BEFORE, BETWEEN, TAG = "Question: ", "\nAnswer:", " "


class Set(NamedTuple):
    """One of the four sets: its file, and which columns are asked for."""

    file: str
    paraphrase: str
    forget: bool = False
    normalised: bool = False


SETS = {
    "forget": Set("forget10_perturbed", "paraphrased_answer", forget=True),
    "retain": Set("retain_perturbed", "paraphrased_answer"),
    "real_authors": Set("real_authors_perturbed", "answer", normalised=True),
    "world_facts": Set("world_facts_perturbed", "answer", normalised=True),
}
Rows = Sequence[dict[str, Any]]


class Published:
    """The published procedure on one model.

    Source: metrics of TOFU, closer-look, DualOptim and DualOptim+ as their code computes them.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, width: int, new_tokens: int
    ) -> None:
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.width = width
        self.new_tokens = new_tokens
        self.rouge = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)

    def __call__(self, data: dict[str, Rows]) -> dict[str, float]:
        """Compute the scores that need no judge."""
        scores: dict[str, float] = {}
        for name, rows in data.items():
            scores |= {f"{name}/{key}": value for key, value in self._set(name, rows).items()}
        utility = [
            value
            for name, value in scores.items()
            if not name.startswith("forget/") and not name.endswith("token_entropy")
        ]
        return {**scores, "MU9": float(hmean(utility))}

    def _set(self, name: str, rows: Rows) -> dict[str, float]:
        of = SETS[name]
        right = self._losses(rows, [row["answer"] for row in rows])
        paraphrase = self._losses(rows, [row[of.paraphrase] for row in rows])
        wrong = torch.stack(
            [
                self._losses(rows, [row["perturbed_answer"][kind] for row in rows])
                for kind in range(len(rows[0]["perturbed_answer"]))
            ]
        )  # (kinds, rows)
        texts = self._generations(rows)
        ratio = torch.exp(paraphrase - wrong.mean(0))
        if of.normalised:
            probability = (-right).exp() / ((-right).exp() + (-wrong).exp().sum(0))
        else:
            probability = (-right).exp()
        indifference = torch.minimum(ratio, 1 / ratio) if of.forget else (1 - ratio).clamp(min=0)
        found = [
            self.rouge.score(row["answer"], text)["rougeL"].recall
            for row, text in zip(rows, texts, strict=True)
        ]
        return {
            "probability_normalised" if of.normalised else "probability": float(probability.mean()),
            "rouge": statistics.fmean(found),
            "truth_ratio": float(indifference.mean()),
            "token_entropy": statistics.fmean(map(self._entropy, texts)),
        }

    @torch.no_grad()
    def _losses(self, rows: Rows, answers: Sequence[str]) -> Tensor:
        """Mean loss of an answer's tokens and one end token, by row, in float64."""
        losses = []
        for part in _batches(list(zip(rows, answers, strict=True))):
            encoded = [self._encode(row["question"], answer) for row, answer in part]
            ids, mask, labels = (torch.tensor(column) for column in zip(*encoded, strict=True))
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            of_tokens = nn.functional.cross_entropy(
                logits[:, :-1].transpose(-1, -2), labels[:, 1:], ignore_index=-100, reduction="none"
            )
            losses.append(of_tokens.sum(-1) / (labels[:, 1:] != -100).sum(-1))
        return torch.cat(losses).double()

    def _encode(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        part = BEFORE + question + BETWEEN
        ids = self.tokenizer(part + TAG + answer, max_length=self.width, truncation=True).input_ids
        end = self.tokenizer.eos_token_id
        pads = self.width - len(ids)
        labels = [*ids, end, *[-100] * (pads - 1)] if pads else list(ids)
        n_question = len(self.tokenizer(part).input_ids)
        labels[:n_question] = [-100] * n_question
        return ids + [end] * pads, [1] * len(ids) + [0] * pads, labels

    @torch.no_grad()
    def _generations(self, rows: Rows) -> list[str]:
        texts = []
        for part in _batches(rows):
            prompts = [BEFORE + row["question"] + BETWEEN for row in part]
            ids = [self.tokenizer(prompt).input_ids for prompt in prompts]
            longest = max(map(len, ids))
            end = self.tokenizer.eos_token_id
            padded = [[end] * (longest - len(prompt)) + prompt for prompt in ids]
            mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids]
            made = self.model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=end,
                eos_token_id=end,
            )
            texts += self.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _entropy(self, text: str) -> float:
        tokens = self.tokenizer.tokenize(text)
        if len(tokens) <= 1:
            return 0.0
        shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
        return -sum(share * math.log2(share) for share in shares) / math.log2(len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--model", type=Path, help="default: random weights")
    parser.add_argument("--limit", type=int, default=300, help="first rows of every set")
    parser.add_argument("--width", type=int, default=256, help="200: TOFU; 256: DualOptim+")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = _measure(given)
    print(json.dumps(result) if given.json else _sentences(result))


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    data = {name: _read(Path(given.tofu) / f"{of.file}.json") for name, of in SETS.items()}
    data = {name: rows[: given.limit] for name, rows in data.items()}
    tokenizer, model = _subject(given, data)
    questions = [row["question"] for rows in data.values() for row in rows]
    longest = max(len(tokenizer(BEFORE + q + BETWEEN).input_ids) for q in questions)
    new_tokens = given.width - longest
    published = Published(model, tokenizer, given.width, new_tokens)
    suite = Suite.load(
        "tofu", folder=given.tofu, judges={}, limit=given.limit, max_new_tokens=new_tokens
    )
    encoder = Encoder(tokenizer, "plain", given.width)

    def ours() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            return evaluate(suite, model, encoder, folder, progress=False).values

    variants: dict[str, Callable[[], dict[str, float]]] = {
        "ours": ours,
        "published": lambda: published(data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    scores: dict[str, dict[str, float]] = {}
    for number in range(given.rounds):
        for name in sorted(variants, reverse=number % 2 == 1):
            started = time.process_time()
            scores[name] = variants[name]()
            seconds[name].append(time.process_time() - started)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)  # a round takes minutes
    differences = [abs(scores["ours"][name] - value) for name, value in scores["published"].items()]
    ratios = [old / new for old, new in zip(seconds["published"], seconds["ours"], strict=True)]
    return {
        "published_seconds": statistics.median(seconds["published"]),
        "ours_seconds": statistics.median(seconds["ours"]),
        "speedup": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        "largest_score_difference": max(differences),
        "scores": len(differences),
        "questions": len(questions),
        "width": given.width,
        "new_tokens": new_tokens,
        "rounds": given.rounds,
        "load": os.getloadavg()[0],
    }


def _subject(given: argparse.Namespace, data: dict[str, Rows]) -> tuple[Any, Any]:
    """Load tokenizer and model, or make them."""
    if given.model is not None:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        return AutoTokenizer.from_pretrained(given.model), model.eval()
    texts = [row[key] for rows in data.values() for row in rows for key in ("question", "answer")]
    tokenizer = new_tokenizer(texts, given.vocabulary)
    new = NewModel(
        hidden_size=given.hidden,
        layers=given.layers,
        heads=max(1, given.hidden // 64),
        context=given.width,
    )
    return tokenizer, new_model(new, tokenizer, seed=0).eval()


def _read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    yield from (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _sentences(result: dict[str, Any]) -> str:
    speedup = result["speedup"]
    return (
        f"{result['questions']} questions, {result['rounds']} rounds, load {result['load']:.1f}: "
        f"published {result['published_seconds']:.1f} s, ours {result['ours_seconds']:.1f} s, "
        f"{speedup['median']:.1f} times quicker ({speedup['min']:.1f} to {speedup['max']:.1f}); "
        f"{result['scores']} scores differ by at most {result['largest_score_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
