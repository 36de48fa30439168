"""What is measured on the image classifier: FA, RA, TA, MIA of a model; Gap and Std of a method."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from vision_task import Images, Task

METRICS = ("FA", "RA", "TA", "MIA")

Row = Mapping[str, float]


class Summary(NamedTuple):
    """A line of the table."""

    mean: dict[str, float]
    std: dict[str, float]
    difference: dict[str, float]
    """Of the means, from retraining's."""
    gap: float
    average_std: float


@torch.inference_mode()
def measure(model: nn.Module, task: Task) -> dict[str, float]:
    """Give accuracy on forget set, rest and test, and the membership attack, in percent."""
    return {
        "FA": accuracy(model, task.forget),
        "RA": accuracy(model, task.retain),
        "TA": accuracy(model, task.test),
        "MIA": membership(*(entropies(model(part.pixels)) for part in task)),
    }


def accuracy(model: nn.Module, images: Images) -> float:
    """Give the share of images that are named rightly, in percent."""
    return 100 * float((model(images.pixels).argmax(1) == images.labels).double().mean())


def entropies(logits: Tensor) -> NDArray[np.float64]:
    """Give the entropy of each prediction in nats; (N, classes) -> (N,)."""
    logps = logits.double().log_softmax(1)
    return -(logps.exp() * logps).sum(1).numpy()


def membership(
    forget: NDArray[np.float64], retain: NDArray[np.float64], test: NDArray[np.float64]
) -> float:
    """Give the share of the forget set that is taken for training data, in percent.

    The attack is a logistic regression on the entropy of the prediction alone, taught with the
    rest (members) and the test set (not members), both with the same weight.

    Args:
        forget, retain, test: Entropies, (n,) each.

    Source: CityU-MLO/DualOptim@0e2737f ImageClassification/evaluation/MIA.py, "entropy".
        Differs: no difference.
    """
    known = np.concatenate([retain, test])[:, None]
    member = np.concatenate([np.ones(len(retain)), np.zeros(len(test))])
    attack = LogisticRegression(class_weight="balanced", solver="lbfgs").fit(known, member)
    return 100 * float(attack.predict(forget[:, None]).mean())


def summarize(rows: Sequence[Row], retrained: Sequence[Row]) -> Summary:
    """Compare a method's seeds with retraining's.

    Gap is the mean over the four metrics of |method's mean - retraining's mean|, Std the mean of
    their four population standard deviations over seeds.

    Source: DualOptim, arXiv:2504.15827, tables of section 5. Differs: no difference.
    """
    mean = {name: statistics.fmean(row[name] for row in rows) for name in METRICS}
    std = {name: statistics.pstdev(row[name] for row in rows) for name in METRICS}
    difference = {
        name: mean[name] - statistics.fmean(row[name] for row in retrained) for name in METRICS
    }
    gap = statistics.fmean(map(abs, difference.values()))
    return Summary(mean, std, difference, gap, statistics.fmean(std.values()))


def markdown(table: Mapping[str, Summary]) -> str:
    """Print the table as the slides have it; in brackets, how far from retraining."""
    lines = [f"| | {' | '.join(METRICS)} | Gap ↓ | Std ↓ |", "|---" * (len(METRICS) + 3) + "|"]
    for title, line in table.items():
        cells = [
            f"{line.mean[name]:.2f} ± {line.std[name]:.2f} ({abs(line.difference[name]):.2f})"
            for name in METRICS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} | {line.gap:.2f} | {line.average_std:.2f} |")
    return "\n".join(lines)
