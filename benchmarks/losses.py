"""Every published loss over a large vocabulary: the package's against all logits at once.

    python benchmarks/losses.py [--vocabulary 128256] [--tokens 1024] [--hidden 512] [--rounds 5]

Naive is the loss as its authors wrote it, on the logits of all scored tokens. Both get the same
hidden states and the same output head, and differentiate with respect to both. Time is process
time on one thread, in turn within a round; memory is the peak beyond the head's gradient, in a
process of its own that returns freed memory at once; errors of gradients are those from float64.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import interleaved, medians, ratios
from torch import Tensor, nn

import unlearn_llm.losses  # noqa: F401  registers the names
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES, Loss
from unlearn_llm.scoring import Head, distributions
from unlearn_llm.types import Scored

SEQUENCES = 8
NAMES = ("gd", "npo", "simnpo", "dpo", "ap", "me", "kl", "undial", "ceu", "pdu")
TITLES = {"gd": "ga, gd, idk"}  # one computation: cross entropy
# Most time and memory of naive; others 1.1, 0.1.
TARGETS = {"npo": (1.2, 0.1), "kl": (1.3, 0.2), "undial": (1.3, 0.2)}


class Problem:
    """Hidden states and targets of a loss's answers, `tokens` in all, and an output head."""

    def __init__(self, loss: Loss, given: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(given.device)

        self.loss = loss
        per_sequence = max(1, given.tokens // SEQUENCES // len(loss.answers))
        self.shape = (SEQUENCES, per_sequence)
        n_tokens = SEQUENCES * per_sequence
        self.head = nn.Linear(given.hidden, given.vocabulary, bias=False, device=given.device)
        # Logits of about 1: their sum over the hidden size has variance 1.
        self.head.weight.data = normal(given.vocabulary, given.hidden) / given.hidden**0.5
        self.hidden, self.reference_hidden, self.targets, self.reference_logp = {}, {}, {}, {}
        for answer in loss.answers:
            hidden = normal(n_tokens, given.hidden)
            self.hidden[answer] = hidden.requires_grad_()
            self.reference_hidden[answer] = hidden.detach() + 0.5 * normal(*hidden.shape)
            draws = torch.randint(given.vocabulary, self.shape, generator=generator)
            self.targets[answer] = draws.to(given.device)
            uniform_logp = -torch.tensor(float(given.vocabulary)).log().to(given.device)
            self.reference_logp[answer] = uniform_logp.expand(self.shape) - 0.5

    def ours(self) -> Tensor:
        """The loss of the package."""
        values = self.loss(self._scored(self.hidden), self._reference())
        if self.loss.per == "sequence":
            return values.mean()
        return values.sum() / sum(len(hidden) for hidden in self.hidden.values())

    def naive(self) -> Tensor:
        """The loss of its authors."""
        return NAIVE[self.loss.name](self)

    def logits(self, answer: str = "original") -> Tensor:
        """(tokens, vocabulary), of all tokens at once."""
        return self.head(self.hidden[answer])

    def nll(self, answer: str = "original") -> Tensor:
        """(B,) summed over the tokens of a sequence."""
        targets = self.targets[answer]
        each = F.cross_entropy(self.logits(answer), targets.flatten(), reduction="none")
        return each.view(targets.shape).sum(-1)

    def reference_nll(self, answer: str = "original") -> Tensor:
        """(B,) of the reference: known, for both variants."""
        return -self.reference_logp[answer].sum(-1)

    def sequence(self, number: int, head: nn.Linear) -> "Problem":
        """One of the sequences alone, in the dtype of the given head."""

        def part(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
            rows = {
                a: tensor.detach().view(SEQUENCES, *shape)[number] for a, tensor in tensors.items()
            }
            return {a: row.to(head.weight.dtype) for a, row in rows.items()}

        alone, n_tokens = copy.copy(self), self.shape[1]
        alone.head, alone.shape = head, (1, n_tokens)
        alone.hidden = part(self.hidden, (n_tokens, head.in_features))
        alone.reference_hidden = part(self.reference_hidden, (n_tokens, head.in_features))
        alone.reference_logp = part(self.reference_logp, (1, n_tokens))
        alone.targets = {a: targets[number : number + 1] for a, targets in self.targets.items()}
        for hidden in alone.hidden.values():
            hidden.requires_grad_()
        return alone

    def gradients(self) -> list[Tensor]:
        """Take the gradients of head and hidden states away."""
        leaves = [self.head.weight, *self.hidden.values()]
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(grads) == len(leaves)
        for leaf in leaves:
            leaf.grad = None
        return grads

    def _scored(self, hidden: Mapping[str, Tensor]) -> dict[str, Scored]:
        head = Head(self.head.forward, self.head.out_features, self.head)
        targets = {answer: targets.flatten() for answer, targets in self.targets.items()}
        found = distributions(hidden, targets, head)
        return {a: Scored(self._mask, self.targets[a], one) for a, one in found.items()}

    def _reference(self) -> dict[str, Scored]:
        if self.loss.reference != "logp":
            return self._scored(self.reference_hidden)
        return {
            answer: Scored(self._mask, self.targets[answer], token_logps=logp)
            for answer, logp in self.reference_logp.items()
        }

    @property
    def _mask(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.bool, device=self.head.weight.device)


# The losses as written by their authors, with the logits of all tokens.


def naive_cross_entropy(problem: Problem) -> Tensor:
    return F.cross_entropy(problem.logits(), problem.targets["original"].flatten())


def naive_npo(problem: Problem, beta: float = 0.1) -> Tensor:
    ratio = problem.nll() - problem.reference_nll()
    return -F.logsigmoid(beta * ratio).mean() * 2 / beta


def naive_simnpo(problem: Problem, beta: float = 2.5) -> Tensor:
    return -F.logsigmoid(beta * problem.nll() / problem.shape[1]).mean() * 2 / beta


def naive_dpo(problem: Problem, beta: float = 0.1) -> Tensor:
    chosen, rejected = (problem.nll(a) - problem.reference_nll(a) for a in ("idk", "original"))
    return -F.logsigmoid(beta * (rejected - chosen)).mean() * 2 / beta


def naive_ap(problem: Problem, beta: float = 0.1) -> Tensor:
    return -F.logsigmoid(beta * (problem.nll("idk") - problem.nll("original"))).mean() / beta


def naive_me(problem: Problem, epsilon: float = 1e-12) -> Tensor:
    probabilities = torch.softmax(problem.logits(), dim=-1)
    uniform = torch.full_like(probabilities, 1 / probabilities.shape[-1])
    return F.kl_div((probabilities + epsilon).log(), uniform, reduction="batchmean")


def naive_kl(problem: Problem) -> Tensor:
    with torch.no_grad():
        reference = F.log_softmax(problem.head(problem.reference_hidden["original"]), dim=-1)
    policy = F.log_softmax(problem.logits(), dim=-1)
    return F.kl_div(policy, reference, reduction="batchmean", log_target=True)


def naive_undial(problem: Problem, beta: float = 10.0) -> Tensor:
    answers = problem.targets["original"].view(-1, 1)
    with torch.no_grad():
        reference = problem.head(problem.reference_hidden["original"])
        lower = torch.full_like(answers, -beta, dtype=reference.dtype)
        soft_labels = torch.softmax(reference.scatter_add_(1, answers, lower), dim=-1)
    return F.cross_entropy(problem.logits(), soft_labels)


def naive_ceu(problem: Problem) -> Tensor:
    logits, answers = problem.logits(), problem.targets["original"].view(-1, 1)
    modified = logits.detach().clone().scatter_(1, answers, -torch.inf)
    return F.cross_entropy(logits, torch.softmax(modified, dim=-1))


def naive_pdu(problem: Problem) -> Tensor:
    logits = problem.logits()
    return (logits.max(dim=-1).values - logits.mean(dim=-1)).square().mean()


NAIVE: dict[str, Callable[[Problem], Tensor]] = {
    "gd": naive_cross_entropy,
    "npo": naive_npo,
    "simnpo": naive_simnpo,
    "dpo": naive_dpo,
    "ap": naive_ap,
    "me": naive_me,
    "kl": naive_kl,
    "undial": naive_undial,
    "ceu": naive_ceu,
    "pdu": naive_pdu,
}


def main() -> None:
    """Measure time and gradients here and memory in another process; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=1024, help="scored, over all answers")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peaks:
        print(json.dumps({name: _peaks(_problem(name, given)) for name in NAMES}))
        return

    peaks = _peaks_of_another_process()
    losses = {}
    for name in NAMES:
        losses[name] = {**_times(_problem(name, given), given.rounds), "peak_bytes": peaks[name]}
        losses[name]["peak_ratio"] = peaks[name]["ours"] / peaks[name]["naive"]
    sizes = {key: getattr(given, key) for key in ("vocabulary", "tokens", "hidden", "rounds")}
    result = {**sizes, "device": given.device, "load": os.getloadavg()[0], "losses": losses}
    print(json.dumps(result) if given.json else _markdown(result))


def _problem(name: str, given: argparse.Namespace) -> Problem:
    return Problem((FORGET_LOSSES if name in FORGET_LOSSES else RETAIN_LOSSES)[name], given)


def _times(problem: Problem, rounds: int) -> dict[str, Any]:
    """Seconds by variant, their ratio by round, and how far the gradients are apart."""
    variants = {variant: partial(_run, problem, variant) for variant in ("naive", "ours")}
    for run in variants.values():
        run()  # warm-up
    seconds = interleaved(variants, rounds)
    return {
        "seconds": medians(seconds),
        "time_ratio": ratios(seconds["ours"], seconds["naive"]),
        "gradient_error": _gradient_errors(problem),
    }


def _run(problem: Problem, variant: str) -> float:
    problem.head.weight.grad = None
    for hidden in problem.hidden.values():
        hidden.grad = None
    clock = time.process_time
    if problem.head.weight.is_cuda:
        torch.cuda.synchronize()
        clock = time.perf_counter
    started = clock()
    getattr(problem, variant)().backward()
    if problem.head.weight.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def _gradient_errors(problem: Problem) -> dict[str, float]:
    """By variant: norm of what differs from float64 over the norm, the larger of head and hidden.

    Taken sequence by sequence, as every loss here is a mean over sequences of one length. Without
    the 1e-12 of `me`, which alone changes its gradient by 1.5e-5.
    """
    head = copy.deepcopy(problem.head).double()
    head.weight.grad = None
    naive = (
        partial(naive_me, epsilon=0.0) if problem.loss.name == "me" else NAIVE[problem.loss.name]
    )
    by_sequence = []
    for number in range(SEQUENCES):
        alone = problem.sequence(number, head)
        (naive(alone) / SEQUENCES).backward()
        by_sequence.append([hidden.grad for hidden in alone.hidden.values()])
    exact = [head.weight.grad, *(torch.cat(grads) for grads in zip(*by_sequence, strict=True))]
    errors = {}
    for variant in ("naive", "ours"):
        _run(problem, variant)
        pairs = zip(problem.gradients(), exact, strict=True)
        errors[variant] = max(float((grad - true).norm() / true.norm()) for grad, true in pairs)
    return errors


# Memory.


def _peaks_of_another_process() -> dict[str, dict[str, int]]:
    # Blocks above 64 KiB are mapped one by one, so that freed memory is not counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, "--peaks"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, dict[str, int]] = json.loads(done.stdout)
    return peaks


def _peaks(problem: Problem) -> dict[str, int]:
    """Bytes at the peak of loss and backward pass, beyond what was there and the head's gradient.

    Differs: of a naive loss whose peak comes before the head's gradient is made, that gradient is
    subtracted all the same: what naive needs is rather underestimated.
    """
    peaks = {}
    for variant in ("ours", "naive"):
        _run(problem, variant)
        problem.gradients()
        before = _memory("VmRSS") if not problem.head.weight.is_cuda else _reset_cuda()
        if not problem.head.weight.is_cuda:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        _run(problem, variant)
        on_gpu = problem.head.weight.is_cuda
        peak = torch.cuda.max_memory_allocated() if on_gpu else _memory("VmHWM")
        peaks[variant] = max(1, peak - before - problem.head.weight.nbytes)
        problem.gradients()
    return peaks


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_cuda() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        f"V={result['vocabulary']}, T={result['tokens']}, H={result['hidden']}, "
        f"{result['rounds']} rounds, {result['device']}, load {result['load']:.1f}",
        "",
        "| loss | s naive | s ours | time ratio (min to max) | most | MB naive | MB ours "
        "| peak ratio | most | gradient error naive | ours |",
        "|---" * 11 + "|",
    ]
    for name, row in result["losses"].items():
        most_time, most_memory = TARGETS.get(name, (1.1, 0.1))
        seconds, ratio, peak = row["seconds"], row["time_ratio"], row["peak_bytes"]
        lines.append(
            f"| {TITLES.get(name, name)} | {seconds['naive']:.2f} | {seconds['ours']:.2f} "
            f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | {most_time} "
            f"| {peak['naive'] / 1e6:.0f} | {peak['ours'] / 1e6:.0f} "
            f"| {row['peak_ratio']:.3f} | {most_memory} "
            f"| {row['gradient_error']['naive']:.1e} | {row['gradient_error']['ours']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
