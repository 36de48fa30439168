"""What a recipe takes, put together; and the command that says it."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel

from unlearn_llm import cli
from unlearn_llm.errors import UserError
from unlearn_llm.models import ModelSettings
from unlearn_llm.planning.contentless import contentless
from unlearn_llm.planning.hardware import GIB, GPUS, Hardware, find
from unlearn_llm.planning.memory import Held, Weights, memory
from unlearn_llm.planning.plan import VECTORS, plan
from unlearn_llm.planning.simulation import Cost
from unlearn_llm.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["H100"]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe whose model is a config.json without weights, and load it."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "model")

    def make(model=None, **train):
        settings = {"max_steps": 6, "schedule_parameters": {"forget": 1, "retain": 1}, **train}
        if settings.get("schedule") == "joint":
            del settings["schedule_parameters"]
        document = {
            "model": {"path": str(tmp_path / "model"), **(model or {})},
            "data": {"forget": "none.jsonl", "retain": "none.jsonl", "template": "plain"},
            "train": {"objective": "idk+gd", **settings},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        return Recipe.load(file)

    return make


ENTRIES = 2 * 500 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


def test_nothing_is_loaded(recipe, monkeypatch):
    def refuse(*given, **keywords):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    found = plan(recipe(optimizer="dual_adamw_plus"), H100, length=50)
    assert found.weights.entries == found.weights.trained_entries == ENTRIES
    # What trains is kept in float32, whatever the file says.
    assert found.memory.parts["weights"] == pytest.approx(4 * ENTRIES, rel=1e-3)  # and buffers
    assert found.memory.parts["gradients"] == 4 * ENTRIES
    assert found.memory.parts["optimiser states"] == 24 * ENTRIES
    assert found.fits


@pytest.mark.parametrize(
    ("model", "train", "copies"),
    [
        ({}, {"objective": "npo+gd"}, 0),  # log-probabilities, computed once
        ({}, {"objective": "npo+gd", "reference": "frozen"}, 1),
        ({}, {"objective": "npo+kl"}, 1),
        ({"lora": {"r": 2}}, {"objective": "npo+kl"}, 0),  # the adapter, switched off
        ({"lora": {"r": 2}}, {"objective": "npo+kl", "reference": "frozen"}, 1),
    ],
)
def test_a_frozen_copy_is_there_where_the_loss_needs_one(recipe, model, train, copies):
    parts = plan(recipe(model, schedule="joint", **train), H100, length=20).memory.parts
    assert parts["reference"] == copies * parts["weights"]


def test_lora_trains_and_keeps_states_of_its_matrices_only(recipe):
    found = plan(recipe({"lora": {"r": 2}}), H100, length=20)
    matrices = 2 * (4 * 2 * (32 + 32) + 3 * 2 * (32 + 64))
    assert found.weights.trained_entries == matrices
    assert found.memory.parts["optimiser states"] == 8 * matrices
    frozen = 2 * ENTRIES  # as the file has them
    assert found.memory.parts["weights"] == pytest.approx(frozen + 4 * matrices, rel=1e-3)


def test_combinations_and_masks_keep_what_they_say(recipe):
    surgery = plan(recipe(schedule="joint", combine="surgery"), H100, length=20).memory.parts
    assert surgery["combination"] == 4 * ENTRIES
    salun = plan(recipe(schedule="joint", mask="salun"), H100, length=20).memory.parts
    assert salun["mask"] == ENTRIES


def test_vectors_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Combinations")[1].split("Passes are per micro-batch")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")][1:]
    named = {row[0].strip("| `"): int(re.findall(r"\d+", row[4])[-1]) for row in rows}
    assert {name: n for name, n in named.items() if n} == VECTORS


# Engines, by hand. A model of 1000 float32 weights: 4 layers of 200, and 200 outside of them.

MODEL = Weights(4000, 4000, layer=800, rest=800, entries=1000, trained_entries=1000)
HELD = Held(MODEL, states=8000)
COST = Cost(activations=500, logits=50, peak=4300, without_gradients=700, forward=0, flops=0)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (None, 4000 + 8000 + 4300),
        ("ddp", 4000 + 8000 + 4000 + 4300),  # buckets
        ("fsdp2", 1000 + 2000 + (3 * 800 + 800) + 700 + 1000),
        ("zero1", 4000 + 2000 + 1000 + 4300),  # a flat copy of the shard
        ("zero2", 4000 + 2000 + 1000 + 700 + 1000),
        ("zero3", 1000 + 2000 + 1000 + (3 * 800 + 800) + 700 + 1000),
    ],
)
def test_an_engine_divides_over_four_processes(engine, expected):
    found = memory(HELD, COST, engine, 1 if engine is None else 4)
    assert (found.peak, found.moment) == (expected, "backward pass")


def test_the_optimisers_step_may_be_the_worst_moment():
    cost = COST._replace(peak=3000, without_gradients=100)
    assert memory(HELD, cost, None, 1).peak == 4000 + 8000 + 4000
    masked = memory(Held(MODEL, 8000, mask=1000), cost, None, 1)
    assert masked.peak == 4000 + 8000 + 1000 + 4000 + 4000  # a copy of the weights
    assert masked.moment == "optimiser step"


def test_gradients_set_aside_count_in_the_passes_that_come_after():
    # The cost of the passes knows of the first vector; others are there all the time.
    cost = COST._replace(peak=9000)
    assert memory(Held(MODEL, 8000, vectors=4000), cost, None, 1).peak == 4000 + 8000 + 9000
    of_two = memory(Held(MODEL, 8000, vectors=8000), cost, None, 1)
    assert of_two.peak == 4000 + 8000 + 4000 + 9000
    assert of_two.parts["combination"] == 8000
    # Both gradients are there when the last pass is done, whatever it took.
    assert memory(Held(MODEL, 8000, vectors=4000), COST, None, 1).peak == 4000 + 8000 + 8000


# Time.


def test_time_is_arithmetic_or_traffic_whichever_takes_longer(recipe):
    made = recipe(per_device_train_batch_size=8)
    quick = Hardware("X", GIB, bandwidth=1e18, bf16=1e12, float32=1e9, utilisation=0.5)
    found = plan(made, quick, length=52)
    entries = ENTRIES - 500 * 32  # embeddings are looked up
    head, tokens, scored = 500 * 32, 8 * 52, 4 * 52
    products = 6 * ((entries - head) * tokens + head * scored)
    attention = 2 * (4 + 10) * 8 * 52**2 * 32  # of two layers, forward and backward
    per_step = (products + attention) / 5e8
    assert found.seconds_per_step[("retain",)] == pytest.approx(per_step, rel=0.01)
    assert found.seconds == pytest.approx(6 * found.seconds_per_step[("retain",)])
    slow = quick._replace(bandwidth=1e6, float32=1e18)
    of_step = plan(made, slow, length=52).seconds_per_step[("retain",)]
    # Weights twice and gradients; then weights twice, gradients, and states twice.
    least = (3 * 4 + 3 * 4 + 2 * 8) * ENTRIES / 1e6
    assert least < of_step < 5 * least


def test_the_number_of_steps_may_be_unknown(recipe):
    assert plan(recipe(max_steps=-1), H100, length=20).seconds is None


# Hardware.


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("RTX4090", "RTX-4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("L40S", "L40S"),
    ],
)
def test_hardware_is_found_by_its_name(said, meant):
    assert find(said).name == meant


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(UserError, match=r"'H1000' is not known\. Did you mean 'H100'"):
        find("H1000")


def test_this_cpu_is_measured():
    found = find("cpu")
    assert 1e9 < found.float32 < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert found.memory > GIB


# The command.


@pytest.fixture
def unlearn(capsys, monkeypatch):
    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["unlearn", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_says_whether_it_fits(recipe, unlearn, tmp_path, monkeypatch):
    recipe()
    file = str(tmp_path / "recipe.yaml")
    code, out, _ = unlearn("plan", file, "--hardware", "L4", "--length", "30")
    assert code == 0
    assert "0.1 million weights, 0.1 train" in out
    assert "needed of 22.00: fits" in out
    assert "an estimate, at 40% of the peak rate" in out
    assert "30 tokens in every row, as given." in out
    monkeypatch.setitem(GPUS, "L4", GPUS["L4"]._replace(memory=GIB // 2))
    _, out, _ = unlearn("plan", file, "--hardware", "L4", "--length", "30")
    assert "needed of 0.50: does NOT fit" in out


def test_the_command_prints_json_alone(recipe, unlearn, tmp_path):
    recipe()
    options = ("--hardware", "H200", "--processes", "4", "--engine", "fsdp2", "--length", "30")
    code, out, _ = unlearn("plan", str(tmp_path / "recipe.yaml"), *options, "--json")
    found = json.loads(out)
    assert (code, found["engine"], found["processes"], found["fits"]) == (0, "fsdp2", 4, True)
    assert found["bytes"]["optimiser states"] == 8 * ENTRIES / 4
    assert found["steps"] == {"forget": 3, "retain": 3}
    assert "no run on several GPUs was measured" in found["notes"][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hardware", "H1000"], "--hardware: 'H1000' is not known"),
        (["--engine", "fsdp2"], "give --processes of 2 or more"),
        (["--engine", "zero4", "--processes", "2"], "--engine: expected ddp, fsdp2, zero1"),
        (["model.path=./absent"], "there is no folder ./absent"),
        (["model.four_bit={}", "model.lora={r: 2}"], "4-bit weights cannot be planned"),
    ],
)
def test_a_mistake_is_one_line(recipe, unlearn, tmp_path, options, message):
    recipe()
    words = [word for word in options if "=" in word]
    rest = [word for word in options if "=" not in word]
    hardware = [] if "--hardware" in rest else ["--hardware", "H100"]
    code, out, err = unlearn("plan", str(tmp_path / "recipe.yaml"), *words, *rest, *hardware)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_adapter_that_is_trained_further_is_planned_on_its_base(recipe, tmp_path):
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "model"),
        "r": 2,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    made = contentless(ModelSettings(path=str(tmp_path / "adapter")), FakeTensorMode())
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trained == 2 * 2 * (32 + 32)
    on_base = ModelSettings(path=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    made = contentless(on_base, FakeTensorMode())
    assert trained == sum(p.numel() for p in made.parameters() if p.requires_grad)
    # Its base with the adapter switched off is not the model at the start: a copy is needed.
    made = recipe({"path": str(tmp_path / "adapter")}, schedule="joint", objective="npo+kl")
    parts = plan(made, H100, length=20).memory.parts
    assert parts["reference"] == parts["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("title", ["DualOptim+ 8 bit", "LoRA, checkpointing"])
def test_the_peak_that_is_planned_is_the_one_that_is_measured(title):
    import plan as benchmark

    (row,) = benchmark.compare([title]).values()
    assert abs(row["error"]) <= benchmark.WITHIN
