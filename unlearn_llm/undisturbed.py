"""Measuring in the middle of training, as if nobody had."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give every generator of random numbers, and every module's mode, its state back afterwards.

    A judge that is loaded, or a user's function that samples, draws random numbers; dropout would
    then drop other units than in a run without evaluation.
    """
    python, of_numpy = random.getstate(), np.random.get_state()
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        for module, training in modes.items():
            module.training = training
