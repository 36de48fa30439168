"""Probing: a linear classifier on hidden states tells true answers from wrong ones."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from unlearn_llm.attacks.base import (
    Fact,
    Material,
    NotMeasured,
    Subject,
    Trial,
    attack,
    drawn,
)
from unlearn_llm.dataset import Collator
from unlearn_llm.evaluation.batching import Item, batches, evaluating
from unlearn_llm.scoring import unwrapped

BUDGET = 4096
"""Most tokens of a batch; all layers' states are kept."""
FOLDS = 5
LEAST_ROWS = 10

States = list[NDArray[np.float32]]
"""Per row: (1 + wrong answers, layers, hidden size), the true answer first."""


@attack("probing")
def probing(
    subject: Subject,
    material: Material,
    *,
    rows: int = 200,
    inverse_penalty: float = 0.01,
    seed: int = 0,
) -> list[Trial]:
    """Train the classifier on retained rows, with true and wrong answers; ask it about forget rows.

    It sees the states of one layer, averaged over the answer's tokens; the layer is the one that
    ranks best on retained rows that were left out of training. The value of a row is the share of
    its wrong answers that rank below the true one: 0.5 is chance.

    Args:
        rows: Most retained rows to learn from, drawn by the seed.
        inverse_penalty: scikit-learn's C.

    Source: Patil et al. 2024, arXiv:2309.17410 (states keep what answers hide); linear probes of
        truth, Azaria and Mitchell 2023, arXiv:2304.13734. Differs: averaged states; ranks.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise NotMeasured("needs scikit-learn: pip install 'unlearn_llm[attacks]'") from error
    known = drawn([f for f in material.probe or material.retain if f.wrong], rows, seed)
    asked = [fact for fact in material.forget if fact.wrong]
    if len(known) < LEAST_ROWS or not asked:
        raise NotMeasured(
            f"needs wrong answers (column perturbed_answer) of {LEAST_ROWS} retain rows and of the "
            f"forget rows, got {len(known)} and {len(asked)}"
        )

    def ranks(train: Sequence[int], layer: int, tested: States) -> list[float]:
        probe = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=2000),
        )
        states = [learnt[row][:, layer] for row in train]
        truth = [np.arange(len(answers)) == 0 for answers in states]
        probe.fit(np.concatenate(states), np.concatenate(truth))
        return [rank(probe.decision_function(answers[:, layer])) for answers in tested]

    learnt, found = answer_states(subject, known), answer_states(subject, asked)
    everything = range(len(known))
    quality = []
    for layer in range(learnt[0].shape[1]):
        held_out = []
        for fold in range(FOLDS):
            train = [row for row in everything if row % FOLDS != fold]
            held_out += ranks(train, layer, learnt[fold::FOLDS])
        quality.append(float(np.mean(held_out)))
    layer = int(np.argmax(quality))
    values = ranks(everything, layer, found)
    details = {"layer": layer, "retain": quality[layer]}
    by_row = {fact.id: value for fact, value in zip(asked, values, strict=True)}
    return [Trial("probing", by_row, is_text=False, details=details)]


def rank(scores: NDArray[np.float64]) -> float:
    """Share of the wrong answers (all but the first) that score below the true one; ties half."""
    true, wrong = scores[0], scores[1:]
    return float(np.mean((wrong < true) + 0.5 * (wrong == true)))


def answer_states(subject: Subject, facts: Sequence[Fact]) -> States:
    """Take the hidden states of every layer, averaged over the tokens of each answer."""
    model, tokenizer = subject.model, subject.encoder.tokenizer
    inner = unwrapped(model)
    pad_id = tokenizer.pad_token_id
    collator = Collator(int(tokenizer.eos_token_id if pad_id is None else pad_id))
    asked = [
        (fact.question, answer)
        for fact in facts
        for answer in (fact.paraphrased_answer or fact.answer, *fact.wrong)
    ]
    encoded = subject.encoder.pairs([q for q, _ in asked], [a for _, a in asked])
    found: dict[int, NDArray[np.float32]] = {}
    items = [Item(number, one.ids) for number, one in enumerate(encoded)]
    with evaluating(model), torch.no_grad():
        for batch in batches(items, BUDGET):
            ids = collator.pad([item.ids for item in batch], collator.pad_id).to(inner.device)
            mask = collator.pad([[1] * len(item.ids) for item in batch], 0).to(inner.device)
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            layers = torch.stack(states.hidden_states, dim=2)  # (B, T, layers, H)
            for row, item in enumerate(batch):
                answer = layers[row, encoded[item.key].n_prompt : len(item.ids) - 1]
                found[item.key] = answer.float().mean(0).cpu().numpy()
    rows, start = [], 0
    for fact in facts:
        stop = start + 1 + len(fact.wrong)
        rows.append(np.stack([found[number] for number in range(start, stop)]))
        start = stop
    return rows
