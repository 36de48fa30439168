"""How requests fall into batches, and what happens when one does not fit into memory."""

import pytest
import torch

from unlearn_llm.evaluation.batching import Item, batches, halving


def test_batches_keep_within_the_budget_longest_first():
    items = [Item(length, [0] * length) for length in (5, 40, 17, 16, 33, 1)]
    made = [[item.key for item in batch] for batch in batches(items, budget=96)]
    assert made == [[40, 33], [17, 16, 5], [1]]  # 2 x 48, 3 x 32, 1 x 16


def test_a_row_longer_than_the_budget_goes_alone():
    items = [Item(length, [0] * length) for length in (50, 60)]
    assert [len(batch) for batch in batches(items, budget=10)] == [1, 1]


def test_batches_that_do_not_fit_into_memory_are_halved():
    def fits_two(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        return [2 * number for number in batch]

    parts = list(halving(fits_two, [1, 2, 3, 4, 5]))
    assert [number for part in parts for number in part] == [2, 4, 6, 8, 10]


def test_a_single_row_that_does_not_fit_is_an_error():
    def fits_nothing(batch):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        list(halving(fits_nothing, [1, 2]))
