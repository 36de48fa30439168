"""Two processes (gloo, DDP, started by torchrun) must do what one process does."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import distributed_run
import pytest
import torch

pytestmark = pytest.mark.slow

ALTERNATE = {"schedule": "alternate", "schedule_parameters": {"forget": 1, "retain": 2}}
JOINT = {"schedule": "joint"}
# Windows of four rows everywhere; by process: two rows, or twice one.
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
TWICE_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}

RUNS = {
    "joint_adamw_dpo_kl": {"settings": {**JOINT, **TWO, "objective": "dpo+kl"}},
    "joint_adamw_idk_ap_phi": {
        "family": "phi",
        "settings": {**JOINT, **TWICE_ONE, "objective": "idk+ap"},
    },
    "alternate_adamw_npo_gd": {"settings": {**ALTERNATE, **TWICE_ONE, "objective": "npo+gd"}},
    "alternate_dual_dpo_kl_phi": {
        "family": "phi",
        "settings": {**ALTERNATE, **TWO, "objective": "dpo+kl", "optimizer": "dual_adamw"},
    },
    "alternate_dual_idk_ap": {
        "settings": {**ALTERNATE, **TWICE_ONE, "objective": "idk+ap", "optimizer": "dual_adamw"},
    },
    "alternate_dual_npo_kl_lora": {
        "lora": True,
        "settings": {**ALTERNATE, **TWO, "objective": "npo+kl", "optimizer": "dual_adamw"},
    },
    "alternate_dual_npo_kl_continued_lora": {
        "lora": "continued",
        "settings": {**ALTERNATE, **TWO, "objective": "npo+kl", "optimizer": "dual_adamw"},
    },
    "alternate_dual_npo_kl_qlora": {
        "lora": "four_bit",
        "settings": {**ALTERNATE, **TWO, "objective": "npo+kl", "optimizer": "dual_adamw"},
    },
    "alternate_hidden_states": {
        "settings": {
            **ALTERNATE,
            **TWICE_ONE,
            "objective": "rmu+embed_diff",
            "forget_parameters": {"layers": [0]},
            "retain_parameters": {"layers": [0]},
        },
    },
    "joint_fixed_pairing_me_gd": {
        "settings": {**JOINT, **TWO, "objective": "me+gd", "pairing": "fixed"},
    },
    "joint_surgery_npo_gd": {
        "settings": {**JOINT, **TWICE_ONE, "objective": "npo+gd", "combine": "surgery"},
    },
    "joint_gru_idk_gd_lora": {
        "lora": True,
        "settings": {**JOINT, **TWO, "objective": "idk+gd", "combine": "gru"},
    },
    "joint_ngdiff_probing": {
        "settings": {
            **JOINT,
            **TWICE_ONE,
            "objective": "idk+ap",
            "combine": "ngdiff",
            "combine_parameters": {"probe_every": 2},
        },
    },
    "joint_implicit_surgery": {
        "settings": {**JOINT, **TWICE_ONE, "objective": "npo+gd", "combine": "implicit_surgery"},
    },
    "joint_salun": {"settings": {**JOINT, **TWICE_ONE, "objective": "idk+gd", "mask": "salun"}},
    "alternate_sfron_lora": {
        "lora": True,
        "settings": {**ALTERNATE, **TWO, "objective": "adaga+gd", "mask": "sfron"},
    },
    "alternate_adaga": {"settings": {**ALTERNATE, **TWICE_ONE, "objective": "adaga+gd"}},
    "alternate_scrub": {"settings": {**ALTERNATE, **TWO, "objective": "scrub+gd_kl"}},
    "joint_checkpointing_lora": {
        "lora": True,
        "settings": {
            **JOINT,
            **TWICE_ONE,
            "objective": "idk+gd",
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    },
}
SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
RESUMED = {
    name: {**RUNS[name], "settings": {**RUNS[name]["settings"], **SAVING}}
    for name in (
        "alternate_dual_dpo_kl_phi",
        "joint_adamw_dpo_kl",
        "alternate_dual_npo_kl_lora",
        "alternate_dual_npo_kl_continued_lora",
        "alternate_dual_npo_kl_qlora",
        "joint_gru_idk_gd_lora",
        "joint_implicit_surgery",
        "joint_salun",
        "alternate_sfron_lora",
    )
}


def torchrun(folder: Path, runs: list[dict]) -> None:
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, distributed_run.__file__, str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of all runs with two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    torchrun(folder, [{"name": name, "output_dir": name, **run} for name, run in RUNS.items()])
    return folder


@pytest.fixture(scope="module")
def resumed_folder(tmp_path_factory):
    """Some runs uninterrupted, and then, in new processes, again from their fourth step."""
    folder = tmp_path_factory.mktemp("resumed")
    whole = [{"name": f"whole_{n}", "output_dir": n, **run} for n, run in RESUMED.items()]
    again = [
        {"name": f"resumed_{n}", "output_dir": n, "resume": f"{n}/checkpoint-4", **run}
        for n, run in RESUMED.items()
    ]
    torchrun(folder, whole)
    torchrun(folder, again)
    return folder


def alone(name, folder):
    run = RUNS[name]
    run = {**run, "name": name, "output_dir": "alone", "settings": {**run["settings"], **FOUR}}
    return distributed_run.result(distributed_run.train(run, folder))


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_process_trains(folder, tmp_path, name):
    two, one = load(folder, name), alone(name, tmp_path)
    assert (two.pop("ranks"), one.pop("ranks")) == (2, 1)
    ours, theirs = two.pop("weights"), one.pop("weights")
    for key, values in one.items():
        # float32 sums in another order: 1e-6 each, grown by six steps of training.
        torch.testing.assert_close(two[key], values, rtol=1e-4, atol=1e-6, msg=key)
    # Adam divides by sqrt(v): an entry whose gradient is all rounding may differ by a whole step,
    # so the weights are compared as a vector.
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", [name for name in RUNS if "mask" in RUNS[name]["settings"]])
def test_the_ranks_hold_the_same_entries(folder, name):
    masks = [torch.load(folder / f"{name}.mask.{rank}.pt") for rank in (0, 1)]
    assert masks[0]
    assert all(map(torch.equal, *masks))


def rows_of(folder, name, role):
    """Rows by step: those of both ranks together."""
    ranks = [json.loads((folder / f"{name}.rows.{rank}.json").read_text()) for rank in (0, 1)]
    per_step = RUNS[name]["settings"]["gradient_accumulation_steps"]
    steps = []
    for start in range(0, len(ranks[0]), per_step):
        batches = [batch for rank in ranks for batch in rank[start : start + per_step]]
        steps.append([row for batch in batches for row in batch.get(role, [])])
    return steps


@pytest.mark.parametrize("name", RUNS)
def test_the_ranks_of_a_step_hold_the_same_roles(folder, name):
    ranks = [json.loads((folder / f"{name}.rows.{rank}.json").read_text()) for rank in (0, 1)]
    assert [list(batch) for batch in ranks[0]] == [list(batch) for batch in ranks[1]]


@pytest.mark.parametrize("name", [name for name in RUNS if "fixed" not in name])
def test_no_retain_row_is_drawn_twice_across_ranks(folder, name):
    # 24 draws at most, of 173 retain rows: all within the first pass.
    drawn = [row for step in rows_of(folder, name, "retain") for row in step]
    assert len(drawn) >= 16
    assert max(Counter(drawn).values()) == 1


@pytest.mark.parametrize("name", [name for name in RUNS if "joint" in name])
def test_forget_rows_are_drawn_equally_often_across_ranks(folder, name):
    # 24 draws of ten rows: two passes and four rows.
    counts = Counter(row for step in rows_of(folder, name, "forget") for row in step)
    assert sorted(counts.values()) == [2] * 6 + [3] * 4


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_draw_the_rows_of_one_process(folder, tmp_path, name):
    alone(name, tmp_path)
    batches = json.loads((tmp_path / f"{name}.rows.0.json").read_text())
    for role in ("forget", "retain"):
        one = [sorted(batch.get(role, [])) for batch in batches]
        assert [sorted(step) for step in rows_of(folder, name, role)] == one


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resumed_in_mid_cycle_are_the_uninterrupted_run(resumed_folder, name):
    whole, resumed = (load(resumed_folder, f"{kind}_{name}") for kind in ("whole", "resumed"))
    assert torch.equal(whole["weights"], resumed["weights"])
    for key in ("grad_norm", "forget/loss", "retain/loss"):
        assert torch.equal(whole[key], resumed[key]), key
