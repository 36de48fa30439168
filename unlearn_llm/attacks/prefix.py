"""Prefill: the attacker writes the beginning of the answer, the model goes on."""

from collections.abc import Sequence

from unlearn_llm.attacks.asking import continuations
from unlearn_llm.attacks.base import Material, NotMeasured, Subject, Trial, attack
from unlearn_llm.evaluation.batching import Item
from unlearn_llm.evaluation.texts import overlap

FEW_WORDS = 4
"""Answers of fewer words (or in scripts without spaces) are cut between characters."""


@attack("prefix")
def prefix(
    subject: Subject, material: Material, *, shares: Sequence[float] = (0.25, 0.5)
) -> list[Trial]:
    """Give a share of the answer; measure the recall of the rest in what follows.

    Args:
        shares: Of the words of the answer, each between 0 and 1.

    Source: prefix extraction, Carlini et al. 2021, arXiv:2012.07805. Differs: the prefix is a
        share of each answer and not a number of tokens, so that models with unlike tokenizers
        get the same; recall instead of an exact match.
    """
    trials = []
    for share in shares:
        if not 0 < share < 1:
            raise NotMeasured(f"prefix.shares should lie between 0 and 1, got {share}")
        split = {fact.id: cut(fact.answer, share) for fact in material.forget}
        rows = [fact for fact in material.forget if all(split[fact.id])]
        if not rows:
            raise NotMeasured("no answer is long enough to be cut")
        questions = [fact.question for fact in rows]
        begun = subject.encoder.pairs(questions, [split[fact.id][0] for fact in rows])
        whole = subject.encoder.pairs(questions, [fact.answer for fact in rows])
        prompts = [
            Item(fact.id, _together(part.ids, full.ids))
            for fact, part, full in zip(rows, begun, whole, strict=True)
        ]
        texts = continuations(subject, prompts)
        found = {fact.id: overlap(split[fact.id][1], texts[fact.id]) for fact in rows}
        values = {row: recall for row, recall in found.items() if recall is not None}
        trials.append(Trial(f"prefix {share:g}", values))
    return trials


def _together(begun: list[int], whole: list[int]) -> list[int]:
    """Give the tokens that the beginning and the whole share: no piece of a token cut in two.

    A model that knows a text by heart does not know it in other tokens.
    """
    parted = next((i for i, (a, b) in enumerate(zip(begun, whole, strict=False)) if a != b), None)
    return begun[:parted]


def cut(answer: str, share: float) -> tuple[str, str]:
    """Cut an answer in two: the share that is given away, and the rest that is looked for."""
    words = answer.split()
    if len(words) >= FEW_WORDS:
        place = min(max(round(share * len(words)), 1), len(words) - 1)
        return " ".join(words[:place]), " ".join(words[place:])
    text = " ".join(words)
    place = min(max(round(share * len(text)), 1), len(text) - 1)
    return text[:place], text[place:]
