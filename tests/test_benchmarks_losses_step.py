"""The two benchmarks at toy size: what they print, and that both variants are the same loss."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import synthetic_pairs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZES = {"vocabulary": 300, "tokens": 32, "hidden": 8}


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch):
    """They import what lies beside them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(name, monkeypatch, capsys, *words):
    """What the benchmark's command prints, as JSON; nothing else may stand before it."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), "--json", *words])
    try:
        load(name).main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out)


def options(sizes):
    return [word for name, size in sizes.items() for word in (f"--{name}", str(size))]


def test_the_losses_have_the_gradients_of_their_naive_forms():
    losses = load("losses")
    given = argparse.Namespace(**SIZES, device="cpu")
    for name in losses.NAMES:
        errors = losses._gradient_errors(losses._problem(name, given))
        assert max(errors.values()) <= 1e-5, name


@pytest.mark.slow
def test_the_benchmark_of_losses_says_time_memory_and_gradients(monkeypatch, capsys):
    result = printed("losses", monkeypatch, capsys, *options({**SIZES, "rounds": 2}))
    assert {key: result[key] for key in SIZES} == SIZES
    assert set(result["losses"]) == {
        *("gd", "npo", "simnpo", "dpo", "ap", "me", "kl"),
        *("undial", "ceu", "pdu"),
    }
    for row in result["losses"].values():
        assert row["gradient_error"]["ours"] <= 1e-5
        assert row["time_ratio"]["min"] <= row["time_ratio"]["median"] <= row["time_ratio"]["max"]
        assert set(row["seconds"]) == set(row["peak_bytes"]) == {"naive", "ours"}


@pytest.fixture
def tofu(tmp_path):
    """A folder of TOFU's files, with generated authors in it."""
    for split in ("forget10", "retain90"):
        rows = [pair._asdict() for pair in synthetic_pairs(split)[:12]]
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}.json").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_benchmark_of_a_step_compares_equal_steps(tofu, monkeypatch, capsys):
    small = {"hidden": 16, "layers": 1, "vocabulary": 300, "window": 8, "rounds": 1, "steps": 2}
    result = printed("step", monkeypatch, capsys, "--tofu", str(tofu), *options(small))
    assert result["window"] == 8
    assert set(result["cases"]) == {"idk", "gd", "npo", "dpo", "ap"}
    for row in result["cases"].values():
        # float32, sums over padded rows in another order.
        assert row["gradient_difference"] <= 1e-5
        tokens = row["tokens_per_useful_token"]
        assert 1 <= tokens["mean"] <= tokens["worst"] < tokens["released"]
        assert set(row["seconds"]) == {"released", "ours"}
