"""What a bug report has to say about a machine: versions, devices, settings; no paths, no names."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

PACKAGE = "unlearn_llm"
SHOWN = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("HF_HUB_OFFLINE", "ACCELERATE_TORCH_DEVICE"),
)
"""Variables of the environment that change what a run does. Numbers and device names are shown."""
HARMLESS = re.compile(r"[0-9,]{1,40}|cpu|mps|(?:cuda|xpu|npu)(?::[0-9]+)?")
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def describe() -> dict[str, str]:
    """Say with what the package runs, in the order in which a reader wants it."""
    return {
        PACKAGE: _version(PACKAGE) or "not installed",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        **dict(_devices()),
        **{name: version or "not installed" for name, version in _packages().items()},
        **dict(_variables()),
    }


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cores", f"{os.cpu_count()}, threads of torch {torch.get_num_threads()}"
    yield "CUDA", str(torch.version.cuda or "not in this build of torch")
    if torch.backends.mps.is_available():
        yield "device", "mps"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        size = f"{found.total_memory / 2**30:.1f} GiB, compute {found.major}.{found.minor}"
        yield f"device {number}", f"{found.name}, {size}"
    if not torch.cuda.is_available():
        yield "CUDA devices", "none that torch can use"


def _packages() -> dict[str, str | None]:
    """Versions of what the package needs, and of what its extras would bring."""
    try:
        needed = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    names = [match[0] for text in needed if (match := NAME.match(text))]
    return {name: _version(name) for name in dict.fromkeys(names)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _variables() -> Iterator[tuple[str, str]]:
    for name in SHOWN:
        if name in os.environ:
            value = os.environ[name]
            yield name, value if HARMLESS.fullmatch(value) else "set"
