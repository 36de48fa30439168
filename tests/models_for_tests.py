"""Small models, rows and trainers, made from nothing in a second."""

from functools import cache

import torch
from transformers import TrainerCallback

from unlearn_llm import synthetic
from unlearn_llm.config import UnlearnConfig
from unlearn_llm.encode import Encoder
from unlearn_llm.models import LoraSettings, NewModel, add_lora, new_model, new_tokenizer
from unlearn_llm.rows import QA, to_pairs
from unlearn_llm.trainer import UnlearnTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2}
REFUSALS = ["I don't know.", "I cannot say anything about that.", "That is beyond me, sorry."]


@cache
def synthetic_pairs(split: str) -> list[QA]:
    """Questions and answers of 20 generated authors, 5 each."""
    rows = synthetic.generate(split, authors=20, questions_per_author=5)
    return to_pairs(rows, split)


@cache
def small_tokenizer():
    """A byte-level BPE tokenizer of 600 tokens, without a chat template."""
    pairs = [*synthetic_pairs("forget10"), *synthetic_pairs("retain90")]
    return new_tokenizer([text for pair in pairs for text in pair[:2]], vocabulary=600)


def tiny_model(family: str = "llama", seed: int = 0, lora: bool = False):
    """Two layers, hidden size 32. Phi's head has a bias and is not tied; Llama's is tied."""
    settings = NewModel(family=family, hidden_size=32, layers=2, heads=2, context=256)
    model = new_model(settings, small_tokenizer(), seed)
    if lora:
        torch.manual_seed(seed + 1)
        model = add_lora(model, LoraSettings(r=4, alpha=8))
    return model


def train_adapter_a_little(model, seed: int = 5):
    """Give a fresh adapter weights that change the model, as an earlier task would have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_trainer(output_dir, model=None, *, forget=None, retain=None, given=None, **settings):
    """A trainer on synthetic authors; `settings` are those of UnlearnConfig."""
    config = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "schedule_parameters": {"forget": 1, "retain": 2},
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if settings.get("schedule", "alternate") != "alternate":
        del config["schedule_parameters"]
    tokenizer = small_tokenizer()
    return UnlearnTrainer(
        model if model is not None else tiny_model(),
        UnlearnConfig(**{**config, **settings}),
        forget_dataset=forget if forget is not None else synthetic_pairs("forget10"),
        retain_dataset=retain if retain is not None else synthetic_pairs("retain90"),
        processing_class=tokenizer,
        encoder=Encoder(tokenizer, "plain"),
        refusals=REFUSALS,
        **(given or {}),
    )


def weights(model) -> torch.Tensor:
    """All trainable weights of a model in one vector."""
    parts = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(parts).clone()


def history(trainer, key: str) -> list[float]:
    """What was logged under a key, in order."""
    return [line[key] for line in trainer.state.log_history if key in line]


def trained(output_dir, model=None, **settings):
    """The trainer of `make_trainer` after training."""
    trainer = make_trainer(output_dir, model, **settings)
    trainer.train()
    return trainer


def rows_drawn(trainer):
    """The draws of the whole run, in order."""
    return [draw for batch in trainer.get_train_dataloader().batch_sampler for draw in batch]


class EveryStep(TrainerCallback):
    """Calls a function at every event of the Trainer, with the event's name."""

    def __init__(self, function):
        self.function = function

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.function("before", state, kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.function("after", state, kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.function("end", state, kwargs)
