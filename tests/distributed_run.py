"""Runs of two processes for test_distributed.py, started by torchrun.

Takes a JSON file: a list of runs. Each holds `name`, `output_dir`, `family`, `lora` (true, or
"continued" or "four_bit"), `resume` and `settings`. Rank 0 writes weights, gradient norms and
losses of every run to NAME.pt; each rank writes the rows that its loader deals to
NAME.rows.RANK.json, and its mask to NAME.mask.RANK.pt.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from models_for_tests import history, make_trainer, tiny_model, train_adapter_a_little, weights
from ranks import leave

from unlearn_llm.four_bit import FourBit
from unlearn_llm.models import LoraSettings, ModelSettings, load_model


def rows_dealt(trainer) -> list[dict[str, list[int]]]:
    """By micro-batch: the rows of each role that this rank reads."""
    return [
        {role: next(iter(answers.values()))["rows"].tolist() for role, answers in batch.items()}
        for batch in trainer.get_train_dataloader()
    ]


def model_of(run: dict, folder: Path):
    """A tiny model as a run wants it."""
    family, lora = run.get("family", "llama"), run.get("lora", False)
    if lora == "four_bit":
        base, four_bit = str(folder / f"base_{family}"), FourBit(compute_dtype="float32")
        with PartialState(cpu=True).main_process_first():
            tiny_model(family).save_pretrained(base)  # by the first process alone
        torch.manual_seed(1)
        return load_model(ModelSettings(path=base, lora=LoraSettings(r=4), four_bit=four_bit))
    model = tiny_model(family, lora=bool(lora))
    return train_adapter_a_little(model) if lora == "continued" else model


def train(run: dict, folder: Path):
    """Do one run and return its trainer."""
    trainer = make_trainer(folder / run["output_dir"], model_of(run, folder), **run["settings"])
    rank = trainer.args.process_index
    (folder / f"{run['name']}.rows.{rank}.json").write_text(json.dumps(rows_dealt(trainer)))
    resume = run.get("resume")
    trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    torch.save(trainer.masking.mask, folder / f"{run['name']}.mask.{rank}.pt")
    return trainer


def result(trainer) -> dict:
    """What two runs are compared by."""
    return {
        "ranks": trainer.args.world_size,
        "weights": weights(trainer.model),
        **{
            key: torch.tensor(history(trainer, key), dtype=torch.float64)
            for key in ("grad_norm", "forget/grad_norm", "retain/grad_norm", "forget/loss",
                        "retain/loss")
        },
    }  # fmt: skip


def main() -> None:
    """Do all runs of the file in the order in which they stand."""
    file = Path(sys.argv[1])
    for run in json.loads(file.read_text()):
        trainer = train(run, file.parent)
        if trainer.args.process_index == 0:
            torch.save(result(trainer), file.parent / f"{run['name']}.pt")
    leave()


if __name__ == "__main__":
    main()
