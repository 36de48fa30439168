"""Under FSDP2, two processes must keep and step 8-bit moments as one process does."""

import json
import os
import subprocess
import sys

import pytest
import sharded_run
import torch

pytestmark = [
    pytest.mark.slow,
    # One process reads what two have written; DCP says that it is alone.
    pytest.mark.filterwarnings("ignore:.*torch.distributed is.*:UserWarning"),
]


def torchrun(processes, folder, rounding):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc_per_node={processes}", sharded_run.__file__, str(folder), rounding],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=["nearest", "stochastic"])
def two(request, tmp_path_factory):
    """The folder and the rounding of a run with two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    torchrun(2, folder, request.param)
    return folder, request.param


STEPS = len(sharded_run.ROLES)
# For rows that are not whole blocks one process uses codes and two do not.
ALIKE = ("odd", "one", "small")
ONLY_ALONE = ("ragged", "flat")


@pytest.fixture(scope="module")
def one(two):
    """Weights and states of one process that does the same."""
    ends = {}
    for names, bits in ((ALIKE, 8), (ONLY_ALONE, 32)):
        model, optimizer = sharded_run.build(two[1], bits=bits)
        sharded_run.run(model, optimizer, 0, STEPS)
        end = sharded_run.whole(model, optimizer)
        ends |= {name: end[name] for name in names}
    return ends


def load(folder, name):
    return torch.load(folder / name, weights_only=True)


def assert_equal(actual, expected, names=sharded_run.SHAPES):
    for name in names:
        assert actual[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            value, twin = torch.as_tensor(value), torch.as_tensor(actual[name][key])
            assert twin.dtype == value.dtype, (name, key)
            assert torch.equal(twin, value), (name, key)


def test_two_processes_step_as_one_does(two, one):
    assert_equal(load(two[0], "end.pt"), one)
    assert one["odd"]["forget_mean"].dtype == torch.uint8


@pytest.mark.parametrize("processes", [2, 1])
def test_processes_resume_from_the_checkpoint_of_two(two, processes):
    folder, rounding = two
    torchrun(processes, folder, rounding)
    assert_equal(load(folder, f"again.{processes}.pt"), load(folder, "end.pt"))


def test_without_shards_one_resumes_from_the_checkpoint_of_two(two):
    folder, rounding = two
    model, optimizer = sharded_run.build(rounding, names=ALIKE)
    sharded_run.restore(model, optimizer, folder / "checkpoint")
    sharded_run.run(model, optimizer, sharded_run.MIDDLE, STEPS)
    assert_equal(sharded_run.whole(model, optimizer), load(folder, "end.pt"), ALIKE)


def test_a_gathered_state_is_whole(two, one):
    gathered = load(two[0], "gathered.pt")
    for name in sharded_run.SHAPES:
        for key, value in gathered[name].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(one[name][key])), (name, key)


def test_ranks_keep_their_rows_and_their_scales(two):
    ranks = [json.loads((two[0] / f"kept.{rank}.json").read_text()) for rank in (0, 1)]
    for key in ("forget_mean", "retain_square", "base_square"):
        assert [kept["odd"][key] for kept in ranks] == [
            ["torch.uint8", [4, 512]],
            ["torch.uint8", [3, 512]],
        ]
        assert [kept["odd"][key + "_scale"] for kept in ranks] == [
            ["torch.float32", [4, 2]],
            ["torch.float32", [3, 2]],
        ]
        assert [kept["one"][key] for kept in ranks] == [
            ["torch.uint8", [1, 2048]],
            ["torch.uint8", [0, 2048]],
        ]


@pytest.mark.parametrize("name", ["ragged", "flat", "small"])
def test_rows_that_are_not_whole_blocks_and_small_ones_keep_float32(two, name):
    ranks = [json.loads((two[0] / f"kept.{rank}.json").read_text()) for rank in (0, 1)]
    for kept in ranks:
        assert kept[name]
        assert {dtype for dtype, _ in kept[name].values()} == {"torch.float32"}
        assert not any(key.endswith("_scale") for key in kept[name])
