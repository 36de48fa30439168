"""Trees of answers, drawn by hand."""

import pytest
import torch

from unlearn_llm.evaluation.trees import Tree


def two_answers():
    """Prompt 1 2, answers 3 4 5 and 3 6 5: they part after the 3.

    Nodes: 0:1 - 1:2 - 2:3 - 3:4 and, after node 2, 4:6. The last tokens are only predicted.
    """
    tree = Tree()
    tree.add("first", [1, 2, 3, 4, 5], n_prompt=2)
    tree.add("second", [1, 2, 3, 6, 5], n_prompt=2)
    return tree


def test_what_sequences_share_stands_once():
    tree = two_answers()
    assert tree.ids == [1, 2, 3, 4, 6]
    assert tree.positions == [0, 1, 2, 3, 3]


def test_scored_tokens_know_the_node_before_them():
    tree = two_answers()
    assert list(zip(tree.predictors, tree.targets, strict=True)) == [
        (1, 3), (2, 4), (3, 5), (2, 6), (4, 5),
    ]  # fmt: skip
    assert tree.paths == {"first": [0, 1, 2], "second": [0, 3, 4]}


def test_a_node_sees_itself_and_its_ancestors():
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    assert torch.equal(two_answers().mask(), torch.tensor(expected).bool())


@pytest.mark.parametrize("in_order", [True, False])
def test_the_mask_follows_from_the_paths_of_many_random_sequences(in_order):
    """Each sequence's nodes, found by walking the ids, see exactly the nodes before them."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 3, (7,), generator=generator).tolist() for _ in range(30)]
    tree = Tree()
    for number, ids in enumerate(sorted(sequences) if in_order else sequences):
        tree.add(number, ids, n_prompt=1)
    mask = tree.mask()
    for number, ids in enumerate(sorted(sequences) if in_order else sequences):
        nodes = [tree.predictors[place] for place in tree.paths[number]]
        assert [tree.ids[node] for node in nodes] == ids[:-1]
        assert [tree.positions[node] for node in nodes] == list(range(6))
        assert [tree.targets[place] for place in tree.paths[number]] == ids[1:]
        for length, node in enumerate(nodes, start=1):
            assert mask[node].nonzero().flatten().tolist() == nodes[:length]
    if in_order:  # then every beginning stands once
        assert len(tree.ids) == len({tuple(ids[:n]) for ids in sequences for n in range(1, 7)})


def test_a_sequence_within_another_and_its_repetition_add_no_node():
    tree = Tree()
    tree.add("short", [1, 2], n_prompt=1)
    tree.add("long", [1, 2, 3, 4], n_prompt=1)
    tree.add("again", [1, 2, 3, 4], n_prompt=1)
    assert tree.ids == [1, 2, 3]
    assert tree.paths["again"] == tree.paths["long"] and tree.paths["short"] == [0]


def test_answers_may_begin_at_unlike_places():
    """Where a token straddles the border for one answer only, it is prompt for the other."""
    tree = Tree()
    tree.add("early", [1, 2, 3, 4], n_prompt=2)
    tree.add("late", [1, 2, 3, 5], n_prompt=3)
    tree.add("early again", [1, 2, 3, 6], n_prompt=2)
    scored = {key: [tree.targets[place] for place in path] for key, path in tree.paths.items()}
    assert scored == {"early": [3, 4], "late": [5], "early again": [3, 6]}
    assert tree.ids == [1, 2, 3]


def test_sequences_without_a_common_token_do_not_see_each_other():
    tree = Tree()
    tree.add("first", [1, 2, 3], n_prompt=1)
    tree.add("second", [4, 2, 3], n_prompt=1)
    assert tree.mask().tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]


def test_the_first_token_is_never_scored():
    tree = Tree()
    tree.add("all", [1, 2, 3], n_prompt=0)
    assert tree.targets == [2, 3]
