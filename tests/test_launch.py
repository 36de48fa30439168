"""What launchers set passes; faults of it are in bad_inputs/environment.py."""

import pytest

from unlearn_llm.errors import UserError
from unlearn_llm.launch import check_launch

OF_TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        OF_TORCHRUN,
        {**OF_TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "-1"},
        {"ACCELERATE_TORCH_DEVICE": "cpu"},
        {"RANK": "anything, where there is no world"},
    ],
)
def test_what_launchers_set_passes(environment):
    check_launch(environment)


@pytest.mark.parametrize("size", ["1", "2"])
@pytest.mark.parametrize("missing", list(OF_TORCHRUN))
def test_half_a_launch_is_refused(missing, size):
    given = {**OF_TORCHRUN, "WORLD_SIZE": size, "RANK": "0", "LOCAL_RANK": "0"}
    del given[missing]
    if missing == "LOCAL_RANK" and size == "1":
        check_launch(given)  # one process that is in no group
        return
    with pytest.raises(UserError, match=f" is (set|2), but {missing} is not"):
        check_launch(given)
