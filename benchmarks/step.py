"""One optimiser step on real TOFU rows: the released layout against the package's.

    python benchmarks/step.py --tofu FOLDER [--model FOLDER] [--rounds 5] [--micro-batch 4]

Released: rows padded to 500 tokens in the order drawn, logits of all positions, and a forward pass
of the reference for losses that have one. Ours: the package's plan, collator, scoring and losses,
with reference log-probabilities computed once before. Both train the same rows with the same
loss, so that their gradients must be equal. Time is process time on one thread, in turn.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from interleaved import interleaved, medians, ratios
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import unlearn_llm.losses  # noqa: F401  registers the names
from unlearn_llm.dataset import Collator, EncodedRows, read_refusals
from unlearn_llm.encode import Encoder
from unlearn_llm.models import NewModel, new_model, new_tokenizer
from unlearn_llm.objective import Loss, Objective
from unlearn_llm.reference import Precomputed, Reference, frozen
from unlearn_llm.rows import load_rows, to_pairs
from unlearn_llm.schedule import Alternate, ScheduledSampler
from unlearn_llm.scoring import score
from unlearn_llm.types import IGNORE_INDEX, Role, Scored, Sequences

RELEASED_WIDTH = 500
CASES: dict[str, tuple[str, Role]] = {  # by title: objective and the side that is trained
    "idk": ("idk+gd", "forget"),
    "gd": ("idk+gd", "retain"),
    "npo": ("npo+gd", "forget"),
    "dpo": ("dpo+ap", "forget"),
    "ap": ("dpo+ap", "retain"),
}
SPLITS: dict[Role, str] = {"forget": "tofu/forget10", "retain": "tofu/retain90"}
Batches = Sequence[Mapping[str, Sequences]]


class Step:
    """What both layouts share: a model, its reference, a loss, and the rows of many steps."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        loss: Loss,
        role: Role,
        rows: EncodedRows,
        given: argparse.Namespace,
    ) -> None:
        self.model, self.reference, self.loss, self.role = model, reference, loss, role
        self.rows, self.given = rows, given
        self.cached: Reference | None = None
        if loss.reference is not None:
            one = {role: rows}
            cpu = Accelerator(cpu=True)
            self.cached = Precomputed.compute(reference, one, Collator(0), 16, cpu)

    def batches(self, *, by_length: bool, steps: int) -> Iterator[Batches]:
        """The micro-batches of each step, as the package pads them."""
        sampler = ScheduledSampler(
            Alternate(1, 0) if self.role == "forget" else Alternate(0, 1),
            lengths={self.role: self.rows.lengths},
            steps=steps,
            window=self.given.window,
            seed=self.given.seed,
            by_length=by_length,
        )
        drawn = [draw.forget if self.role == "forget" else draw.retain for draw in sampler]
        size, collator = self.given.micro_batch, Collator(0)
        for start in range(0, len(drawn), self.given.window):
            window = [self.rows[row] for row in drawn[start : start + self.given.window]]
            yield [
                {
                    answer: collator.sequences([sample[answer] for sample in window[i : i + size]])
                    for answer in self.loss.answers
                }
                for i in range(0, len(window), size)
            ]

    def ours(self, batches: Batches) -> None:
        """Backward passes of one step, as the trainer does them."""
        total = self._denominator(batches)
        for batch in batches:
            policy = score(self.model, batch, self.loss.positions)
            reference = self.cached and self.cached(self.role, batch, self.loss.positions)
            (self.loss(policy, reference).sum() / total).backward()

    def released(self, batches: Batches) -> None:
        """Backward passes of one step in the released layout."""
        total = self._denominator(batches)
        for batch in batches:
            wide = {answer: _widened(sequences) for answer, sequences in batch.items()}
            policy = {a: _from_all_logits(self.model, sequences) for a, sequences in wide.items()}
            reference = None
            if self.loss.reference is not None:
                with frozen(self.reference):
                    reference = {a: _from_all_logits(self.reference, wide[a]) for a in wide}
            (self.loss(policy, reference).sum() / total).backward()

    def _denominator(self, batches: Batches) -> int:
        if self.loss.per == "sequence":
            return self.given.window
        return sum(
            int((one["labels"] != IGNORE_INDEX).sum()) for b in batches for one in b.values()
        )


def _widened(sequences: Sequences) -> Sequences:
    missing = RELEASED_WIDTH - sequences["input_ids"].shape[1]
    return Sequences(
        input_ids=F.pad(sequences["input_ids"], (0, missing)),
        attention_mask=F.pad(sequences["attention_mask"], (0, missing)),
        labels=F.pad(sequences["labels"], (0, missing), value=IGNORE_INDEX),
        rows=sequences["rows"],
    )


def _from_all_logits(model: nn.Module, sequences: Sequences) -> Scored:
    inputs = {"input_ids": sequences["input_ids"], "attention_mask": sequences["attention_mask"]}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    labels = sequences["labels"][:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return Scored(labels != IGNORE_INDEX, sequences["input_ids"][:, 1:], token_logps=-nll)


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--model", type=Path, help="folder; without it a small Llama is made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=40, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="steps whose tokens are counted")
    parser.add_argument("--hidden", type=int, default=256, help="of the small Llama")
    parser.add_argument("--layers", type=int, default=4, help="of the small Llama")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the small Llama")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    torch.set_num_threads(1)

    cases = {title: _measure(step) for title, step in _steps(given).items()}
    keys = ("window", "micro_batch", "steps", "rounds", "hidden", "layers", "vocabulary")
    result = {**{key: getattr(given, key) for key in keys}, "load": os.getloadavg()[0]}
    result["model"] = given.model.name if given.model else None
    result["cases"] = cases
    print(json.dumps(result) if given.json else _markdown(result))


def _steps(given: argparse.Namespace) -> dict[str, Step]:
    pairs = {role: to_pairs(load_rows(name, given.tofu), name) for role, name in SPLITS.items()}
    if given.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    else:
        texts = [text for role in pairs for pair in pairs[role] for text in pair[:2]]
        tokenizer = new_tokenizer(texts, given.vocabulary)
        new = NewModel(
            hidden_size=given.hidden,
            layers=given.layers,
            heads=max(1, given.hidden // 64),
            context=RELEASED_WIDTH,
        )
        model = new_model(new, tokenizer, given.seed)
    encoder = Encoder(tokenizer, given.template)
    reference = copy.deepcopy(model).requires_grad_(False)
    # Policy and reference differ, as they do after the first steps.
    generator = torch.Generator().manual_seed(given.seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.05 * parameter.data.std() * noise if parameter.dim() > 1 else 0
    steps = {}
    for title, (objective, role) in CASES.items():
        both = Objective.parse(objective)
        loss = both.forget if role == "forget" else both.retain
        rows = EncodedRows(pairs[role], encoder, loss.answers, refusals=read_refusals())
        steps[title] = Step(model, reference, loss, role, rows, given)
    return steps


def _measure(step: Step) -> dict[str, Any]:
    (in_order,) = step.batches(by_length=False, steps=1)
    (sorted_rows,) = step.batches(by_length=True, steps=1)
    variants: dict[str, Callable[[], None]] = {
        "released": lambda: step.released(in_order),
        "ours": lambda: step.ours(sorted_rows),
    }
    gradients = {name: _gradient(step.model, run) for name, run in variants.items()}
    timed = {name: partial(_seconds, step.model, run) for name, run in variants.items()}
    seconds = interleaved(timed, step.given.rounds)
    difference = gradients["ours"] - gradients["released"]
    return {
        "seconds": medians(seconds),
        "speedup": ratios(seconds["released"], seconds["ours"]),
        "gradient_difference": float(difference.norm() / gradients["released"].norm()),
        "tokens_per_useful_token": _tokens(step),
    }


def _seconds(model: nn.Module, run: Callable[[], None]) -> float:
    model.zero_grad()
    started = time.process_time()
    run()
    return time.process_time() - started


def _gradient(model: nn.Module, run: Callable[[], None]) -> Tensor:
    model.zero_grad()
    run()
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def _tokens(step: Step) -> dict[str, float]:
    """Tokens through the model (on a CPU, one pass by answer) over those that are no padding."""
    ratios, in_order = [], []
    for by_length, found in ((True, ratios), (False, in_order)):
        for batches in step.batches(by_length=by_length, steps=step.given.steps):
            parts = [sequences for batch in batches for sequences in batch.values()]
            useful = sum(int(part["attention_mask"].sum()) for part in parts)
            found.append(sum(part["input_ids"].numel() for part in parts) / useful)
    window = step.given.window * len(step.loss.answers)
    (first,) = step.batches(by_length=True, steps=1)
    useful = sum(int(one["attention_mask"].sum()) for batch in first for one in batch.values())
    return {
        "mean": statistics.fmean(ratios),
        "worst": max(ratios),
        "unsorted": statistics.fmean(in_order),
        "released": RELEASED_WIDTH * window / useful,
    }


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['window']} rows, micro-batch {result['micro_batch']}, {result['rounds']} rounds, "
        f"load {result['load']:.1f}; tokens over {result['steps']} steps",
        "",
        "| loss | s released | s ours | times quicker (min to max) | gradients differ by "
        "| tokens per useful token: mean | worst | not sorted | released |",
        "|---" * 9 + "|",
    ]
    for name, row in result["cases"].items():
        seconds, speedup, tokens = row["seconds"], row["speedup"], row["tokens_per_useful_token"]
        lines.append(
            f"| {name} | {seconds['released']:.2f} | {seconds['ours']:.2f} "
            f"| {speedup['median']:.1f} ({speedup['min']:.1f} to {speedup['max']:.1f}) "
            f"| {row['gradient_difference']:.1e} | {tokens['mean']:.3f} | {tokens['worst']:.3f} "
            f"| {tokens['unsorted']:.3f} | {tokens['released']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
