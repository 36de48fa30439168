"""When a scheduler asks the run to go: all ranks agree on a step, save and leave."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from unlearn_llm.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Listener:
    """What the process has heard. There is one: signals are the process's, not an object's."""

    def __init__(self) -> None:
        self.heard: str | None = None
        self.in_training = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; leave at once unless training has steps to agree on."""
        self.heard = signal.Signals(number).name
        if not self.in_training:
            raise Preempted(
                f"stopped by {self.heard}. What was finished is on the disk; go on with --resume."
            )


_listener = _Listener()


@contextmanager
def listening() -> Iterator[None]:
    """Take SIGTERM and SIGUSR1 as a request to save and go, in place of their default action.

    Raises:
        Preempted: once the request has come; during training after a checkpoint was saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread take signals
        return
    before = {number: signal.signal(number, _listener) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _listener.heard = None


class LeaveTogether(TrainerCallback):
    """Saves and stops all ranks after the same step, if any of them was asked to go.

    Signals reach ranks at different times. A rank that saved by itself would wait in a collective
    that the others never enter, so every step ends with a sum over ranks: one number, beside the
    losses that are summed anyway.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.agreed = False

    @contextmanager
    def training(self) -> Iterator[None]:
        """Put signals off to the end of a step; raise Preempted when training has stopped."""
        self.agreed, _listener.in_training = False, True
        try:
            yield
        finally:
            _listener.in_training = False
        step = self.trainer.state.global_step
        if self.agreed:
            raise Preempted(
                f"asked to go after step {step}: checkpoint-{step} is saved in "
                f"{self.trainer.args.output_dir}. Go on with --resume."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree; the Trainer saves and stops right after this."""
        heard = _listener.heard is not None
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            count = torch.tensor(float(heard), device=accelerator.device)
            heard = bool(accelerator.reduce(count, "sum") > 0)
        if heard:
            self.agreed = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # a scheduler does not wait that long
