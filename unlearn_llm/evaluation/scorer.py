"""Answers what is asked about given answers, token by token: how likely a model finds them."""

from collections.abc import Sequence
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor, nn

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoded, Encoder
from unlearn_llm.evaluation.batching import MULTIPLE, Item
from unlearn_llm.evaluation.readings import READINGS, Reading
from unlearn_llm.evaluation.requests import LogProb, Request, Result, TokenMoments
from unlearn_llm.evaluation.trees import Tree
from unlearn_llm.scoring import PLAIN_HEADS, distributions, hidden_states_for_logits, unwrapped

CPU_BUDGET = 2048
"""Tokens of a batch on a CPU: larger ones fall out of its caches and are a third slower."""
GPU_BUDGET = 16384
TREE_TOKENS = 1024
"""Most tokens of a row of several answers: attention within a row grows with their square."""

Scorable = LogProb | TokenMoments


class Scorer:
    """Asks one model for one reading of its distributions.

    Attributes:
        budget: Most tokens (rows x padded length) of a batch.
        extra: See batches.
    """

    extra = 0

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        pad_id: int,
        budget: int | None,
        reading: Reading = READINGS[LogProb],
    ) -> None:
        self.model = model
        self.what = reading.what
        self._reading = reading
        self.encoder = encoder
        on_cpu = unwrapped(model).device.type == "cpu"
        self.budget = budget or (CPU_BUDGET if on_cpu else GPU_BUDGET)
        self._collator = Collator(pad_id, MULTIPLE)
        self._shares = reads_trees(model, encoder.max_length)

    def items(self, requests: Sequence[Scorable]) -> list[Item]:
        """Make rows of requests: one for each, or for all answers to one question.

        Raises:
            UserError: a question or an answer that cannot be encoded.
        """
        encoded = self.encoder.pairs([r.question for r in requests], [r.answer for r in requests])
        pairs = list(zip(requests, encoded, strict=True))
        trees = _trees(pairs) if self._shares else [_tree([pair]) for pair in pairs]
        return [Item(tree, tree.ids) for tree in trees]

    def requests_of(self, item: Item) -> Sequence[Request]:
        """Give the requests that a row answers."""
        return list(item.key.paths)

    def answer(self, batch: Sequence[Item]) -> list[tuple[Request, Result]]:
        """Score the rows of a batch."""
        trees: list[Tree] = [item.key for item in batch]
        device = unwrapped(self.model).device
        rows = torch.tensor([row for row, tree in enumerate(trees) for _ in tree.predictors])
        nodes = torch.tensor([node for tree in trees for node in tree.predictors])
        targets = torch.tensor([token for tree in trees for token in tree.targets]).to(device)
        inputs = {name: tensor.to(device) for name, tensor in self._inputs(trees).items()}
        with hidden_states_for_logits(self.model) as head:
            states = self.model(**inputs, use_cache=False).logits  # (B, T, H), or V without head
            hidden = {"answer": states[rows.to(states.device), nodes.to(states.device)]}
            found = distributions(hidden, {"answer": targets}, head)["answer"]
            values = found.map(self._reading.of_tokens, targets)
        of_trees = values.cpu().split([len(tree.targets) for tree in trees])
        return [
            (key, self._reading.result(of_tree[path]))
            for tree, of_tree in zip(trees, of_trees, strict=True)
            for key, path in tree.paths.items()
        ]

    def _inputs(self, trees: Sequence[Tree]) -> dict[str, Tensor]:
        ids = self._collator.pad([tree.ids for tree in trees], self._collator.pad_id)
        if not self._shares:
            ones = [[1] * len(tree.ids) for tree in trees]
            return {"input_ids": ids, "attention_mask": self._collator.pad(ones, 0)}
        width = ids.shape[1]
        # Padding sees itself: a row that sees nothing would be NaN.
        mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)  # (B, T, T)
        for row, tree in enumerate(trees):
            mask[row, : len(tree.ids), : len(tree.ids)] = tree.mask()
        inner = unwrapped(self.model)
        if inner.config._attn_implementation == "eager":  # it adds the mask to the scores
            hidden = torch.finfo(inner.dtype).min
            mask = torch.zeros(mask.shape, dtype=inner.dtype).masked_fill(~mask, hidden)
        positions = self._collator.pad([tree.positions for tree in trees], 0)
        return {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": positions}


def reads_trees(model: nn.Module, longest: int) -> bool:
    """Does a model honour a mask and positions of ours, for answers of up to `longest` tokens?

    Flash attention takes no mask, ALiBi no positions, a window would need a mask of its own, and
    a soft prompt has no place in ours.
    """
    config = unwrapped(model).config
    window = getattr(config, "sliding_window", None)
    prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return (
        config.model_type in PLAIN_HEADS
        and config._attn_implementation in ("sdpa", "eager")
        and (window is None or longest <= window)
        and not prompted
    )


def _trees(pairs: Sequence[tuple[Scorable, Encoded]]) -> list[Tree]:
    """Put answers to one question into one tree, or into several where they are many or long."""
    trees = []
    # Sorted by tokens, so that neighbours share most.
    ordered = sorted(pairs, key=lambda pair: (pair[0].question, pair[1].ids))
    for _, group in groupby(ordered, key=lambda pair: pair[0].question):
        part: list[tuple[Scorable, Encoded]] = []
        for pair in group:
            if part and sum(len(one.ids) for _, one in [*part, pair]) > TREE_TOKENS:
                trees.append(_tree(part))
                part = []
            part.append(pair)
        trees.append(_tree(part))
    return trees


def _tree(pairs: Sequence[tuple[Scorable, Encoded]]) -> Tree:
    tree = Tree()
    for request, encoded in pairs:
        tree.add(request, encoded.ids, encoded.n_prompt)
    return tree
