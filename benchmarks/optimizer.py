"""One optimiser step: time, bytes of state and extra memory, ours beside others', in one run.

    python benchmarks/optimizer.py [--threads 2] [--rounds 9] [--device cuda] [--json]

All variants step the same parameters (Llama shapes) with the same gradients, one after the other
in every round, so that a busy machine slows all of them; compare ratios, not milliseconds.
*elementwise* is the released way to write the step, a chain of whole-tensor operations (the 8-bit
one on bitsandbytes' block-wise primitives), written anew here.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from unlearn_llm.optim import DualAdamWPlus, set_role

BETAS = (0.9, 0.95)
CYCLE = ("forget", *["retain"] * 5)
MIB = 2**20
MOVED = {  # bytes that a step must read and write per float32 parameter with its gradient
    "torch_adamw_fused": 28,
    "bnb_adamw8bit": 16.1,
    "torchao_adamw8bit": 16.1,
    "dual_plus_32": 44,
    "dual_plus_8": 20.1,
}
Step = Callable[[str], None]


def llama_shapes(hidden: int, mlp: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of a Llama's parameters, heads without grouping."""
    layer = [(hidden, hidden)] * 4 + [(mlp, hidden)] * 2 + [(hidden, mlp)] + [(hidden,)] * 2
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


SIZES = {
    "50M": llama_shapes(512, 1408, 6, 32_000),
    "tiny": llama_shapes(64, 176, 2, 512),
    "1.3B": llama_shapes(2048, 5504, 24, 32_000),
    "8B": llama_shapes(4096, 14_336, 32, 128_256),
}


class Elementwise:
    """The released step as a chain of whole-tensor operations, per parameter."""

    def __init__(self, params: list[Tensor], bits: int) -> None:
        self.params, self.bits, self.steps = params, bits, {"forget": 0, "retain": 0}
        self.state: dict[int, dict[str, Any]] = {}
        for index, param in enumerate(params):
            names = [
                f"{owner}_{moment}" for owner in ("forget", "retain", "base") for moment in "mv"
            ]
            self.state[index] = {name: self._store(torch.zeros_like(param), name) for name in names}

    def _store(self, values: Tensor, name: str) -> Any:
        if self.bits == 32 or values.numel() < 4096:
            return values
        import bitsandbytes.functional as bnb

        code = bnb.create_dynamic_map(signed=name != "base_v").to(values.device)
        return bnb.quantize_blockwise(values, code=code, blocksize=256)

    def _load(self, stored: Any) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        import bitsandbytes.functional as bnb

        return bnb.dequantize_blockwise(*stored)

    def _keep(self, state: dict[str, Any], name: str, values: Tensor) -> None:
        new = self._store(values, name)
        if isinstance(new, Tensor):
            state[name].copy_(new)
        else:
            state[name] = new

    @torch.no_grad()
    def step(self, role: str, lr: float = 1e-5, decay: float = 0.01, eps: float = 1e-8) -> None:
        """Take one step of a role."""
        self.steps[role] += 1
        own, total = self.steps[role], sum(self.steps.values())
        before = max(total - 1, 1)
        for index, param in enumerate(self.params):
            grad, state = param.grad, self.state[index]
            base_m, base_v = self._load(state["base_m"]), self._load(state["base_v"])
            m, v = self._load(state[f"{role}_m"]), self._load(state[f"{role}_v"])
            param.mul_(1 - lr * decay)
            base_m_hat = base_m / (1 - BETAS[0] ** before)
            base_v_hat = base_v / (1 - BETAS[1] ** before)
            m.mul_(BETAS[0]).add_((grad - base_m_hat) * (1 - BETAS[0]))
            v.mul_(BETAS[1]).add_((grad * grad - base_v_hat) * (1 - BETAS[1]))
            m_hat = m / (1 - BETAS[0] ** own) + base_m_hat
            v_hat = v / (1 - BETAS[1] ** own) + base_v_hat
            param.add_(m_hat / (v_hat.abs().sqrt() + eps) * -lr)
            base_m.mul_(BETAS[0]).add_(grad * (1 - BETAS[0]))
            base_v.mul_(BETAS[1]).add_(grad * grad * (1 - BETAS[1]))
            for name, values in (("base_m", base_m), ("base_v", base_v)):
                self._keep(state, name, values)
            for name, values in ((f"{role}_m", m), (f"{role}_v", v)):
                self._keep(state, name, values)


def variants(params: list[Tensor], device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name the rows and how to make their optimisers."""
    lr = 1e-5
    compile = None if device == "cuda" else True
    yield "torch_adamw_fused", lambda: torch.optim.AdamW(params, lr=lr, betas=BETAS, fused=True)
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    if has_bitsandbytes:
        from bitsandbytes.optim import AdamW8bit

        yield "bnb_adamw8bit", lambda: AdamW8bit(params, lr=lr, betas=BETAS)
    else:
        print("bitsandbytes is not installed: two rows are missing", file=sys.stderr)
    if find_spec("torchao"):
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        yield "torchao_adamw8bit", lambda: TorchaoAdamW8bit(params, lr=lr, betas=BETAS)
    else:
        print("torchao is not installed: one row is missing", file=sys.stderr)
    yield "dual_plus_32_elementwise", lambda: Elementwise(params, 32)
    yield "dual_plus_32", lambda: DualAdamWPlus(params, lr=lr, compile=compile)
    if has_bitsandbytes:
        yield "dual_plus_8_elementwise", lambda: Elementwise(params, 8)
    yield "dual_plus_8", lambda: DualAdamWPlus(params, lr=lr, state_bits=8, compile=compile)


def stepper(optimizer: Any) -> Step:
    """Give a function that takes one step of a role."""
    if isinstance(optimizer, Elementwise):
        return optimizer.step

    def step(role: str) -> None:
        set_role(optimizer, role)  # type: ignore[arg-type]
        optimizer.step()

    return step


def seconds(function: Callable[[], None], device: str) -> float:
    """Time one call."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def state_bytes(optimizer: Any) -> int:
    """Count the bytes of an optimiser's state tensors, those of tensor subclasses too."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None:
                for name in inner()[0]:
                    visit(getattr(value, name))
            else:
                found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            list(map(visit, value.values()))
        elif isinstance(value, tuple):
            list(map(visit, value))
        elif hasattr(value, "absmax"):
            visit(value.absmax)

    visit(dict(optimizer.state))
    return sum(found.values())


def peak_extra(function: Callable[[], None], device: str) -> int:
    """Measure the bytes that a call needs beside what is there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the high-water mark back
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="50M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="leave the other rows out")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    generator = torch.Generator().manual_seed(0)
    shapes = SIZES[given.size]
    params = [
        torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(given.device))
        for shape in shapes
    ]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(given.device)
    entries = sum(param.numel() for param in params)
    result, probe = measure(params, given.device, given.rounds, given.only)
    if given.json:
        print(json.dumps({"threads": given.threads, "parameters": entries, "variants": result}))
        return
    print(
        f"{entries / 1e6:.1f} M parameters, {len(params)} tensors, {given.threads} threads, "
        f"{given.device}, load {os.getloadavg()[0]:.1f}; copy {probe:.1f} GB/s (read + written)"
    )
    table(result, entries, probe)


def measure(
    params: list[Tensor], device: str, rounds: int, only: list[str] | None = None
) -> tuple[dict[str, dict[str, float]], float]:
    """Step all variants in turn.

    Returns:
        By name the median and quartiles in ms, the first call, bytes and MiB; and the median
        bandwidth of a copy in GB/s.
    """
    made = {name: make() for name, make in variants(params, device) if name in (only or [name])}
    steps = {name: stepper(optimizer) for name, optimizer in made.items()}
    first = {
        name: seconds(lambda step=step: step(CYCLE[0]), device) for name, step in steps.items()
    }
    for role in CYCLE[1:3]:
        for step in steps.values():
            step(role)
    times: dict[str, list[float]] = {name: [] for name in steps}
    source = torch.randn(64 * MIB // 4, device=device)
    target = torch.empty_like(source)
    copies = []
    for number in range(rounds):
        copies.append(seconds(lambda: target.copy_(source), device))  # type: ignore[arg-type,return-value]
        for name, step in steps.items():
            role = CYCLE[number % len(CYCLE)]
            times[name].append(seconds(lambda step=step, role=role: step(role), device))
    if device == "cpu":
        # From here on large tensors come from the system and go back at once, which is slow, but
        # shows the peak.
        ctypes.CDLL(None).mallopt(-3, MIB)
    entries = sum(param.numel() for param in params)
    result = {}
    for name, step in steps.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        result[name] = {
            "median_ms": 1000 * median,
            "state_bytes_per_parameter": state_bytes(made[name]) / entries,
            "peak_extra_mb": peak_extra(lambda step=step: step("retain"), device) / MIB,
            "quartiles_ms": [1000 * low, 1000 * high],
            "first_ms": 1000 * first[name],
        }
    return result, 2 * 64 * MIB / statistics.median(copies) / 1e9


def table(result: dict[str, dict[str, Any]], entries: int, copied: float) -> None:
    """Print times and ratios; `copied` is the bandwidth of a copy in GB/s."""
    print(
        "| | ms (quartiles) | x AdamW fused | x elementwise | of copy bandwidth | first s | "
        "state B/p | extra MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    fused = result.get("torch_adamw_fused", {}).get("median_ms")
    for name, row in result.items():
        time_ms = row["median_ms"]
        chain = result.get(f"{name}_elementwise", {}).get("median_ms")
        used = MOVED.get(name, 0) * entries / time_ms / 1e6 / copied
        low, high = row["quartiles_ms"]
        print(
            f"| {name} | {time_ms:.1f} ({low:.1f} to {high:.1f}) | "
            f"{f'{time_ms / fused:.2f}' if fused else '-'} | "
            f"{f'{chain / time_ms:.1f}' if chain else '-'} | "
            f"{f'{used:.0%}' if used else '-'} | {row['first_ms'] / 1000:.1f} | "
            f"{row['state_bytes_per_parameter']:.2f} | {row['peak_extra_mb']:.1f} |"
        )


if __name__ == "__main__":
    main()
