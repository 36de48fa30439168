"""`unlearn train` with adapters: on a base in 4 bits, on from an earlier one, and its warning."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model
from safetensors.torch import load_file
from test_cli import refused, unlearn  # noqa: F401  a fixture

from unlearn_llm import merge, pipeline

RECIPE = """
kind: unlearn
model: {path: FAMILY, lora: {r: 8, alpha: 16, dropout: 0.1},
        four_bit: {compute_dtype: float32}}
data: {forget: synthetic/forget05, retain: synthetic/retain_perturbed, template: plain,
       max_length: 128}
train: {output_dir: run, objective: npo+kl, max_steps: 3, per_device_train_batch_size: 2,
        schedule_parameters: {forget: 1, retain: 1}, use_cpu: true, save_steps: 1,
        save_strategy: steps, logging_steps: 1, learning_rate: 1e-3, optimizer: dual_adamw_plus,
        optimizer_parameters: {state_bits: 8, min_8bit_size: 256, max_update: 1.0}}
evaluate: {suite: synthetic, overrides: {limit: 2, max_new_tokens: 4}}
"""
ADAPTER = "adapter_model.safetensors"
FULL = "model.four_bit=null"


@pytest.fixture(scope="module", params=["llama", pytest.param("phi", marks=pytest.mark.slow)])
def work(request, tmp_path_factory):
    """A folder with a base and a recipe."""
    folder = tmp_path_factory.mktemp("qlora")
    tiny_model(request.param).save_pretrained(folder / request.param)
    small_tokenizer().save_pretrained(folder / request.param)
    (folder / "forget.yaml").write_text(RECIPE.replace("FAMILY", request.param))
    return folder


@pytest.fixture
def train(work, unlearn, monkeypatch):  # noqa: F811
    """Run the recipe into a folder; a run that is finished is not run again."""
    monkeypatch.chdir(work)

    def run(output, *overrides, code=0):
        settings = [f"train.output_dir={output}", *overrides]
        done = unlearn("train", "forget.yaml", "--json", "--resume", *settings)
        assert done.code == code, done.err
        return done

    return run


def raise_interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


def test_a_run_in_four_bits_that_is_killed_is_the_undisturbed_run_bitwise(train, monkeypatch):
    train("plain", "evaluate=null")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "save_model", raise_interrupt)
        train("killed", "evaluate=null", code=130)
    shutil.rmtree("killed/checkpoint-3")  # it is done again
    train("killed", "evaluate=null")
    assert Path("killed", ADAPTER).read_bytes() == Path("plain", ADAPTER).read_bytes()
    trained = load_file(f"plain/{ADAPTER}")
    assert all(weight.any() for name, weight in trained.items() if "lora_B" in name)
    moments = torch.load("plain/checkpoint-3/optimizer.pt", weights_only=True)["state"].values()
    tensors = [t for one in moments for t in one.values() if isinstance(t, torch.Tensor)]
    assert {t.dtype for t in tensors if t.numel() >= 256} == {torch.uint8}  # DualOptim+ in 8 bits


@pytest.mark.slow
def test_an_evaluation_in_mid_run_changes_nothing(train):
    # dependencies.md 3: bitsandbytes packs 4-bit weights in an evaluation on some CPUs.
    train("whole")
    train("watched", "train.eval_strategy=steps", "train.eval_steps=1", "train.eval_on_start=true")
    assert Path("watched", ADAPTER).read_bytes() == Path("whole", ADAPTER).read_bytes()


@pytest.mark.slow
def test_the_two_references_train_the_same(train):
    for kind in ("precomputed", "adapter"):
        train(kind, f"train.reference={kind}", "train.objective=npo+gd", "evaluate=null")
    ours, theirs = (load_file(f"{kind}/{ADAPTER}") for kind in ("precomputed", "adapter"))
    for name, weight in ours.items():
        # Cached in other batches: float32 rounding, which Adam's first steps make larger.
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-6)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_end_of_a_run_warns_of_the_base_and_a_merge_takes_it_away(
    train,
    unlearn,  # noqa: F811
    monkeypatch,
):
    done = train("whole")
    (line,) = Path("whole/WARNING.txt").read_text().splitlines()
    assert "Its base model still knows" in line and line.endswith("unlearn merge whole OUTPUT")
    assert json.loads(done.out)["warning"] == line
    assert "WARNING.txt" in json.loads(Path("whole/unlearn_manifest.json").read_text())["files"]
    scores = json.loads(Path("whole/evaluation/scores.json").read_text())
    assert scores["model"]["adapter"].startswith("not merged")
    shown = unlearn("train", "forget.yaml", "--resume", "train.output_dir=whole").out
    assert shown.splitlines()[-1] == line

    merged = unlearn("merge", "whole", "merged")
    assert merged.code == 0, merged.err
    assert "weights changed (SHA-256)" in merged.out
    note = json.loads(Path("merged/merge.json").read_text())
    assert note["four_bit"]["quant_type"] == "nf4"  # the run's recipe says so
    # Both are measured as their run measured itself.
    taken = unlearn("eval", "whole", "merged", "--suite", "synthetic", "--json")
    assert taken.code == 0, taken.err
    ours, theirs = json.loads(taken.out)["merged"], json.loads(taken.out)["whole"]
    for name, score in theirs.items():
        if score["value"] is not None:
            assert ours[name]["value"] == pytest.approx(score["value"], abs=1e-4), name
    with monkeypatch.context() as patched:
        patched.setattr(merge, "commit", no_space)
        full = unlearn("merge", "whole", "full")
    assert full.code == 5 and "full could not be written" in full.err
    assert not Path("full").exists() and not list(Path().glob(".merge-*"))
    refused(unlearn("merge", "whole", "merged"), "merged exists; give a new folder")
    refused(unlearn("merge", "merged", "again"), "merged is no adapter")
    refused(unlearn("merge", "whole", "again", "train.seed=2"), "model.four_bit={}")


def test_an_adapter_is_trained_further(train, work):
    (base,) = {"llama", "phi"} & {path.name for path in work.iterdir()}
    train("first", FULL, "evaluate=null")
    on = [FULL, "model.lora=null", "evaluate=null", "train.seed=7", 'train.save_strategy="no"']
    train("by_key", *on, "model.adapter=first")
    train("by_path", *on, "model.path=first")
    first, ours, theirs = (
        load_file(f"{name}/{ADAPTER}") for name in ("first", "by_key", "by_path")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(torch.equal(ours[name], first[name]) for name in ours)
    config = json.loads(Path("by_key/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["r"] == 8
    # At the first forget step npo compares the adapter with itself: 2 / beta log 2.
    log = json.loads(Path("by_key/trainer_state.json").read_text())["log_history"]
    starts = [line["forget/loss"] for line in log if "forget/loss" in line]
    assert starts[0] == pytest.approx(2 / 0.1 * 0.6931, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.lora=null"], "model.four_bit: holds weights that cannot train"),
        (["model.adapter=first"], "model.adapter: is trained further, model.lora is a fresh one"),
        (["model.four_bit={quant_type: nf5}"], "quant_type: expected nf4 or fp4, got 'nf5'"),
        (["model.lora=null", "model.adapter=here"], "model.adapter: here holds no adapter_config"),
    ],
)
def test_what_cannot_work_is_told_before_weights_are_loaded(
    work,
    unlearn,  # noqa: F811
    monkeypatch,
    settings,
    words,
):
    monkeypatch.chdir(work)
    output = "train.output_dir=never"
    refused(unlearn("train", "forget.yaml", output, *settings), words)
