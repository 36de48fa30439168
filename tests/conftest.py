"""What every test may ask for."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it, at its import
if not torch.cuda.is_available():  # before Triton reads it, at its import
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Last, so that nothing is hidden by a benchmark of the same name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of specs and oracles beside the repository; skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("UNLEARN_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder: {folder} is absent (set UNLEARN_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE tokenizer; see models_for_tests."""
    from models_for_tests import small_tokenizer  # here, so that pure tests start fast

    return small_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer):
    """The small tokenizer with a chat template: turns end with their own special token."""
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}\n{{ m['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% endif %}"
    )
    return chat
