"""The benchmark of the evaluation at toy size: both procedures give the same scores."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from unlearn_llm.rows import load_rows

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "evaluation.py"


def load():
    spec = importlib.util.spec_from_file_location("benchmark_evaluation", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tofu(tmp_path):
    """A folder of TOFU's files, with generated authors in it."""
    for split in ("forget10", "retain", "real_authors", "world_facts"):
        rows = load_rows(f"synthetic/{split}_perturbed")[:5]
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}_perturbed.json").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_published_procedure_and_ours_give_the_same_scores(tofu, monkeypatch, capsys):
    threads = torch.get_num_threads()
    sizes = {"hidden": 16, "layers": 1, "vocabulary": 300, "width": 128, "limit": 4}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    monkeypatch.setattr(sys, "argv", [str(FILE), "--json", "--tofu", str(tofu), *words])
    try:
        load().main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == 16 and result["scores"] == 17
    assert result["largest_score_difference"] <= 1e-5
    assert result["published_seconds"] > 0 and result["ours_seconds"] > 0
