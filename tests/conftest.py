"""What every test may ask for."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it, at its import


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of specs and oracles beside the repository; skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("UNLEARN_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder: {folder} is absent (set UNLEARN_SHARED)")
    return folder
