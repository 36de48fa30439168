"""The benchmark of the optimisers: its rows, and that what it compares is the same step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unlearn_llm.optim import DualAdamWPlus, set_role

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import optimizer

    yield optimizer
    del sys.modules["optimizer"]


@pytest.mark.parametrize("bits", [32, 8])
def test_the_elementwise_chain_takes_the_step_of_the_optimizer(benchmark, bits):
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = DualAdamWPlus([ours], lr=1e-5, state_bits=bits, compile=False)
    chain = benchmark.Elementwise([theirs], bits)
    for role in benchmark.CYCLE:
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        set_role(optimizer, role)
        optimizer.step()
        chain.step(role)
    moved = (ours - start).abs().median()
    # Where the second moment is near zero the steps are large and rounding decides.
    assert (ours - theirs).abs().quantile(0.9) < (1e-2 if bits == 32 else 2e-2) * moved


@pytest.mark.slow
def test_the_benchmark_prints_its_rows():
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, str(BENCHMARKS / "optimizer.py"), "--size", "tiny", "--json"]
    only = ["torch_adamw_fused", "dual_plus_32", "dual_plus_8_elementwise", "dual_plus_8"]
    run = subprocess.run(
        [*command, "--rounds", "3", "--threads", "1", "--only", *only],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    assert shown["threads"] == 1 and shown["parameters"] == 166_208
    assert list(shown["variants"]) == only
    size = {name: row["state_bytes_per_parameter"] for name, row in shown["variants"].items()}
    assert size["torch_adamw_fused"] == pytest.approx(8, rel=1e-3)
    assert size["dual_plus_32"] == 24
    assert size["dual_plus_8"] == pytest.approx(6.1, abs=0.1)
    assert all(row["median_ms"] > 0 for row in shown["variants"].values())
