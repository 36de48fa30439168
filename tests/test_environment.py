import json
import sys

import pytest

from unlearn_llm import cli, environment

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def shown(monkeypatch, capsys):
    def show(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["unlearn", "env", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    return show


def test_env_names_versions_and_devices(shown):
    import torch
    import transformers

    lines = shown().splitlines()
    for line in (
        f"- torch: {torch.__version__}",
        f"- transformers: {transformers.__version__}",
        f"- python: {'.'.join(map(str, sys.version_info[:3]))} (CPython)",
        f"- cores: {environment.os.cpu_count()}, threads of torch {torch.get_num_threads()}",
    ):
        assert line in lines
    assert any(line.startswith("- tensorboard: ") for line in lines)  # of an extra
    assert any(line.startswith(("- device 0: ", "- CUDA devices: none")) for line in lines)


def test_env_as_json_says_the_same(shown):
    assert [f"- {k}: {v}" for k, v in json.loads(shown("--json")).items()] == shown().splitlines()


def test_env_tells_no_paths_and_no_secrets(shown, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HF_HOME", "CUDA_VISIBLE_DEVICES", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.setenv(name, f"{tmp_path}/{SECRET}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = shown()
    assert "- WORLD_SIZE: 2" in text and "- CUDA_VISIBLE_DEVICES: set" in text
    hidden = [SECRET, str(tmp_path), sys.prefix, sys.executable, environment.platform.node()]
    assert not [word for word in hidden if word and word in text]


def test_env_counts_the_devices_that_torch_sees(monkeypatch):
    import torch

    device = type("Properties", (), {"name": "H200", "total_memory": 2**37, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    found = environment.describe()
    assert found["device 0"] == "H200, 128.0 GiB, compute 9.0"
    assert "CUDA devices" not in found
