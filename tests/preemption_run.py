"""Two ranks that are asked to go at different times, for test_preemption.py.

For each number of seconds given: train, be told to go, note what was said, resume, compare with the
run that nobody disturbed. Signals come from the test, when FOLDER/training-N-RANK exists; it writes
FOLDER/sent-N after the last.
"""

import json
import sys
import time
from pathlib import Path

import torch
from models_for_tests import EveryStep, make_trainer, weights

from unlearn_llm.errors import Preempted
from unlearn_llm.preemption import listening

STEPS = 60
SETTINGS = {
    "optimizer": "dual_adamw",
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1000,
    "logging_strategy": "no",
}


def disturbed(folder: Path, number: int) -> dict:
    """One run that is asked to go, and its continuation."""

    def on_event(event, state, kwargs):
        if event == "end":
            time.sleep(0.05)  # long enough to be told in mid-training
            if state.global_step == 3:
                (folder / f"training-{number}-{rank}").touch()

    output = folder / f"run-{number}"
    trainer = make_trainer(output, given={"callbacks": [EveryStep(on_event)]}, **SETTINGS)
    rank = trainer.args.process_index
    said = "nothing"
    with listening():
        try:
            trainer.train()
        except Preempted as told:
            said = str(told)
        try:  # the later signal may come when this rank is already on its way out
            while not (folder / f"sent-{number}").exists():
                time.sleep(0.01)
        except Preempted:
            pass
    step = trainer.state.global_step
    trainer.accelerator.wait_for_everyone()
    again = make_trainer(output, **SETTINGS)
    again.train(resume_from_checkpoint=True)
    return {"step": step, "said": said, "weights": weights(again.model)}


def main() -> None:
    """Do all runs; write this rank's results."""
    folder, runs = Path(sys.argv[1]), int(sys.argv[2])
    whole = make_trainer(folder / "whole", **SETTINGS)
    whole.train()
    found = [disturbed(folder, number) for number in range(runs)]
    for run in found:
        run["equal"] = torch.equal(run.pop("weights"), weights(whole.model))
    rank = whole.args.process_index
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
