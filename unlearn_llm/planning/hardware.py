"""Accelerators by name: memory, bandwidth, arithmetic. And what this machine's CPU does."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from unlearn_llm.errors import UserError
from unlearn_llm.registry import did_you_mean

GIB = 2**30


class Hardware(NamedTuple):
    """One device of one process.

    Attributes:
        memory: Bytes that a process can allocate, as torch reports them.
        bandwidth: Bytes per second between memory and chip.
        bf16, float32: Dense operations per second; float32 without tensor cores, as torch does
            by default.
        overhead: Bytes that driver and libraries take before the first tensor.
        utilisation: Share of the operations per second that training is taken to reach.
    """

    name: str
    memory: int
    bandwidth: float
    bf16: float
    float32: float
    overhead: int = round(0.7 * GIB)
    utilisation: float = 0.4


def _gpu(name: str, gib: float, gb_per_second: float, bf16: float, float32: float) -> Hardware:
    """Take GiB, GB/s and TFLOP/s."""
    tera = 1e12
    return Hardware(name, round(gib * GIB), gb_per_second * 1e9, bf16 * tera, float32 * tera)


# Rates from the vendors' data sheets, dense; memory as torch reports it.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A10G", 22.1, 600, 70, 31.2),
        _gpu("A100-40GB", 39.4, 1555, 312, 19.5),
        _gpu("A100-80GB", 79.2, 2039, 312, 19.5),
        _gpu("A6000", 47.5, 768, 155, 38.7),
        _gpu("B200", 178, 8000, 2250, 75),
        _gpu("H100", 79.1, 3350, 989, 67),
        _gpu("H100-PCIe", 79.1, 2000, 756, 51),
        _gpu("H200", 139.7, 4800, 989, 67),
        _gpu("L4", 22.0, 300, 121, 30.3),
        _gpu("L40S", 44.4, 864, 362, 91.6),
        _gpu("RTX-3090", 23.6, 936, 71, 35.6),
        _gpu("RTX-4090", 23.6, 1008, 165, 82.6),
        _gpu("RTX-5090", 31.4, 1792, 210, 105),
    )
}
CPU = "CPU"


def find(name: str | None) -> Hardware:
    """Give the hardware of a name; None: this machine's first GPU, or its CPU.

    Raises:
        UserError: the name is not known.
    """
    if name is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    if name.upper() == CPU:
        return this_cpu()
    # The longest name that fits, so that "NVIDIA A100-SXM4-80GB" is not the card of 40 GB.
    wanted = _words(name)
    found = [gpu for gpu in GPUS.values() if _words(gpu.name) <= wanted]
    if not found:
        known = (*GPUS, CPU)
        raise UserError(
            f"--hardware: {name!r} is not known.{did_you_mean(name, known)} Known: "
            f"{', '.join(known)}."
        )
    return max(found, key=lambda gpu: len(gpu.name))


def this_cpu() -> Hardware:
    """Measure this machine, a second long: a matrix product and a copy, with torch's threads."""
    size = 1024
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(size, size).to(dtype)
        rates[dtype] = 2 * size**3 / _seconds(partial(torch.mm, matrix, matrix))
    source = torch.ones(16 * 2**20)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _seconds(partial(target.copy_, source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bf16, float32 = rates[torch.bfloat16], rates[torch.float32]
    return Hardware(CPU, memory, bandwidth, bf16, float32, overhead=GIB // 2, utilisation=0.7)


def _seconds(function: Callable[[], object], seconds: float = 0.15) -> float:
    """The quickest of as many calls as there is time for, whatever else the machine does."""
    function()
    times: list[float] = []
    until = time.thread_time() + seconds
    while not times or time.thread_time() < until:
        started = time.thread_time()
        function()
        times.append(time.thread_time() - started)
    return min(times)


def _words(name: str) -> set[str]:
    parts = name.upper().replace("_", "-").replace(" ", "-").replace("RTX", "").split("-")
    return {part for part in parts if part}
