"""Hand-written results folders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from finished_runs import AGGREGATE, MODEL, SUITE


@pytest.fixture
def run(tmp_path):
    """Write a finished run; keywords go into its recipe's train section."""

    def write(
        name: str,
        scores: dict[str, float | None],
        *,
        suite: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        kind: str = "unlearn",
        path: str = "locuslab/tofu_ft_phi-1.5",
        n: int = 300,
        reference: str | None = "gold/records.jsonl",
        **train: Any,
    ) -> Path:
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True)
        recipe = {
            "kind": kind,
            "model": {"path": path},
            "data": {"forget": "tofu/forget10", **(data or {})},
            "train": {"objective": "idk+gd", "seed": 0, **train},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        details = {
            "scores": {
                key: {
                    "value": value,
                    "n": n if key == "forget_quality" else None,
                    "note": None,
                    "aggregate": AGGREGATE.get(re.sub(r"_proxy| \[.*", "", key), key),
                }
                for key, value in scores.items()
            },
            "suite": {**SUITE, **(suite or {})},
            "model": {**MODEL, **(model or {})},
            "reference": reference,
        }
        (folder / "evaluation" / "scores.json").write_text(json.dumps(details))
        return folder

    return write
