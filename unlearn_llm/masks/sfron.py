"""SFRon's mask: entries that matter more to the forget set than to the retain set."""

from torch import Tensor

from unlearn_llm.combine.base import check_number
from unlearn_llm.masks.base import MASKS, Gradients, Mask
from unlearn_llm.types import Role


class SFRon(Mask):
    """Entries with Fisher_forget >= threshold * Fisher_retain may move in forget steps.

    Retain steps move everything. Both diagonals are means over rows of the squared gradient of a
    whole answer, so the pass before step one has a batch of one row.

    Args:
        threshold: Of the ratio of the two.

    Source: Huang et al. 2024 (SFRon), arXiv:2409.19732; K1nght/Unified-Unlearning-w-Remain-Geometry
        Classification/unlearn/sfron.py.
    Differs: gradients of single answers are squared; the authors square those of batches of images,
        which makes the ratio depend on the batch size. No 1e-15 is added to the two sides; at
        threshold 1 that changes nothing. Entries that are not chosen keep their value in forget
        steps; in the released code one optimiser's momentum and weight decay move them.
    """

    roles: tuple[Role, ...] = ("forget",)

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = check_number("threshold", threshold, least=0)

    def choose(self, gradients: Gradients) -> list[Tensor]:
        """Compare the two sides entry by entry; what has no gradient at all may move."""
        forget, retain = gradients.mean_square("forget"), gradients.mean_square("retain")
        return [
            ours >= self.threshold * theirs for ours, theirs in zip(forget, retain, strict=True)
        ]


MASKS.add("sfron", SFRon)
