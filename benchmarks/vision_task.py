"""Noisy digits and a small network: what the image classifier learns, and what it must forget.

scikit-learn's 1797 digits (8x8 pixels) are easy: a network that never saw an image knows it as
well as one that did, so that there would be nothing to forget. Gaussian noise of 0.35 of the grey
range, drawn once for each image and never again, leaves about 83 of 100 unseen images readable, and
as there is no augmentation the network learns all its own by heart. So retraining ends near 84
(forget set), 100 (rest) and 83 (test), as it does on the slides' TinyImageNet (85, 100, 85).
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Forget = Literal["random", "class"]

CLASSES = 10
NOISE = 0.35
TEST_SHARE = 0.25
FORGET_SHARE = 0.1
BATCH = 64
EPOCHS = 60
RATE = 1e-3
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.999)


class Images(NamedTuple):
    """Images, (N, 1, 8, 8), and their labels, (N,)."""

    pixels: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> "Images":
        """Pick rows."""
        return Images(self.pixels[rows], self.labels[rows])


class Task(NamedTuple):
    """What one seed is given."""

    forget: Images
    retain: Images
    test: Images

    @property
    def train(self) -> Images:
        """Everything that the original model saw."""
        pairs = zip(self.forget, self.retain, strict=True)
        return Images(*(torch.cat(pair) for pair in pairs))


@lru_cache
def digits() -> tuple[Images, Images]:
    """Give training and test images, with their noise; the same in every run."""
    flat, labels = load_digits(return_X_y=True)
    pixels = (flat / 16).reshape(-1, 1, 8, 8)
    pixels = pixels + NOISE * np.random.default_rng(0).standard_normal(pixels.shape)
    pixels = (pixels - pixels.mean()) / pixels.std()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=0
    )
    every = Images(torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels))
    return every.at(torch.tensor(train)), every.at(torch.tensor(test))


def make_task(seed: int, forget: Forget = "random") -> Task:
    """Split off what a seed forgets.

    Args:
        forget: "random": a tenth of the training images; "class": all of class `seed % 10`, which
            is then no part of the test either.
    """
    train, test = digits()
    if forget == "class":
        named = seed % CLASSES
        chosen = train.labels == named
        test = test.at(test.labels != named)
    else:
        order = torch.randperm(len(train.labels), generator=_generator(seed, 0))
        chosen = torch.zeros(len(train.labels), dtype=torch.bool)
        chosen[order[: round(FORGET_SHARE * len(order))]] = True
    return Task(train.at(chosen), train.at(~chosen), test)


def make_model(seed: int) -> nn.Module:
    """Build the network: two convolutions and two layers, 71,754 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(32 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
        )


def pretrain(images: Images, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """Train from nothing with AdamW, the rate falling along half a cosine.

    Original and retrained model differ in their first weights, too: `seed` is one number for each.
    """
    model = make_model(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    draws = _generator(seed, 1)
    plan = [rows for _ in range(epochs) for rows in batches(len(images.labels), draws)]
    for number, rows in enumerate(plan):
        optimizer.param_groups[0]["lr"] = RATE * half_cosine(number / len(plan))
        optimizer.zero_grad()
        batch = images.at(rows)
        cross_entropy(model(batch.pixels), batch.labels).backward()
        optimizer.step()
    return model


def batches(n: int, draws: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffle n rows and cut them."""
    return torch.randperm(n, generator=draws).split(BATCH)


def half_cosine(progress: float) -> float:
    """Fall from 1 to 0 while progress rises from 0 to 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def _generator(seed: int, stream: int) -> torch.Generator:
    """Keep what a seed is used for apart."""
    return torch.Generator().manual_seed(1000 * seed + stream)
