"""Planned micro-batches against those that the Trainer draws and pads."""

import json

import pytest
import yaml
from models_for_tests import tiny_model

from unlearn_llm.dataset import read_refusals
from unlearn_llm.encode import Encoder
from unlearn_llm.models import load_tokenizer, new_tokenizer
from unlearn_llm.objective import scored_positions
from unlearn_llm.pipeline import forget_and_retain
from unlearn_llm.planning.batches import tokens_of, workload
from unlearn_llm.planning.simulation import Shape
from unlearn_llm.recipe import Recipe
from unlearn_llm.trainer import UnlearnTrainer

TRAIN = {
    "objective": "idk+gd",
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "schedule_parameters": {"forget": 1, "retain": 2},
    "use_cpu": True,
    "report_to": "none",
}


@pytest.fixture
def recipe(tmp_path):
    """A recipe by its settings, with a tokenizer and a config beside it, and no weights."""
    forget, retain = (f"synthetic/{split}" for split in ("forget05", "retain95"))

    def make(data=None, **train):
        document = {
            "model": {"path": str(tmp_path / "model")},
            "data": {"forget": forget, "retain": retain, "template": "plain", **(data or {})},
            "train": {**TRAIN, "output_dir": str(tmp_path / "run"), **train},
        }
        if document["train"].get("schedule") == "joint":
            del document["train"]["schedule_parameters"]
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        return Recipe.load(file)

    tiny_model().config.save_pretrained(tmp_path / "model")
    pairs = [pair for side in forget_and_retain(make().data) for pair in side]
    texts = [text for pair in pairs for text in pair[:2]]
    new_tokenizer(texts, 600).save_pretrained(tmp_path / "model")
    return make


def drawn(recipe):
    """What the Trainer's own loader gives, by roles: shapes by role and answer."""
    tokenizer = load_tokenizer(recipe.model)
    forget, retain = forget_and_retain(recipe.data)
    trainer = UnlearnTrainer(
        tiny_model(),
        recipe.arguments(),
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        encoder=Encoder(tokenizer, "plain"),
        refusals=read_refusals(),
    )
    found = {}
    for batch in trainer.get_train_dataloader():
        shapes = {}
        for role, answers in batch.items():
            positions = trainer._loss(role).positions
            shapes[role] = {
                answer: Shape(
                    *sequences["input_ids"].shape, int(scored_positions(sequences, positions).sum())
                )
                for answer, sequences in answers.items()
            }
        found.setdefault(tuple(batch), []).append(shapes)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "joint"},
        {"schedule": "joint", "pairing": "fixed", "objective": "ceu+kl"},
        {"objective": "dpo+ap", "averaging": "micro_batch", "seed": 3},
    ],
    ids=str,
)
def test_micro_batches_are_those_of_the_trainer(recipe, settings):
    made = recipe(**settings)
    planned, real = workload(made, 1, None), drawn(made)
    assert planned.kinds.keys() == real.keys()
    for kind, batches in real.items():
        of_kind = planned.kinds[kind]
        assert of_kind.steps == len(batches) / 2
        assert of_kind.tokens == sum(map(tokens_of, batches))
        assert of_kind.worst == max(batches, key=tokens_of)
    n_forget, n_retain = map(len, forget_and_retain(made.data))
    assert f"of the {n_forget} forget and {n_retain} retain rows" in planned.note


def test_two_ranks_share_the_micro_batches_of_a_larger_window(recipe):
    # Three rows, two micro-batches and two ranks draw what three rows and four micro-batches do.
    of_two = workload(recipe(), 2, None)
    of_one = workload(recipe(gradient_accumulation_steps=4), 1, None)
    for kind, one in of_one.kinds.items():
        assert of_two.kinds[kind].worst == one.worst
        assert of_two.kinds[kind].tokens == pytest.approx(one.tokens / 2)


def test_epochs_count_the_forget_set(recipe):
    found = workload(recipe(max_steps=-1, num_train_epochs=2), 1, None)
    # Twice 20 rows in windows of 6: 7 forget steps, and twice as many of the others.
    assert {kind: one.steps for kind, one in found.kinds.items()} == {
        ("forget",): 7,
        ("retain",): 14,
    }


def test_log_probabilities_are_computed_once_over_all_rows_that_need_them(recipe):
    assert workload(recipe(), 1, None).reference_tokens == 0
    found = workload(recipe(objective="npo+gd"), 2, None).reference_tokens
    encoder = Encoder(load_tokenizer(recipe().model), "plain")
    forget, _ = forget_and_retain(recipe().data)
    lengths = [len(encoder.pairs([p.question], [p.answer])[0].ids) for p in forget]
    assert found == sum(lengths) / 2
    assert workload(recipe(objective="npo+gd", reference="frozen"), 1, None).reference_tokens == 0


def test_without_data_rows_are_as_long_as_they_may_be(recipe, tmp_path):
    found = workload(recipe({"forget": str(tmp_path / "absent.jsonl"), "max_length": 101}), 1, None)
    assert found.kinds[("forget",)].worst == {"forget": {"idk": Shape(3, 104, 152)}}
    assert found.kinds[("forget",)].tokens == 3 * 2 * 3 * 104
    assert "101 tokens in every row (data.max_length), because of: " in found.note
    assert "absent.jsonl" in found.note


def test_a_length_that_is_given_needs_no_data(recipe, tmp_path):
    absent = {"forget": str(tmp_path / "absent.jsonl")}
    found = workload(recipe(absent, max_steps=-1), 1, 40)
    assert found.kinds[("retain",)].worst == {"retain": {"original": Shape(3, 40, 60)}}
    assert (found.counted, found.note) == (False, "40 tokens in every row, as given")


def test_fine_tuning_takes_the_longest_rows_and_all_tokens(tmp_path):
    file = tmp_path / "recipe.json"
    document = {
        "kind": "finetune",
        "model": {"new": {"vocabulary": 600}},
        "data": {"train": ["synthetic/forget05"], "template": "plain", "max_length": 128},
        "train": {"per_device_train_batch_size": 8, "num_train_epochs": 3},
    }
    file.with_suffix(".yaml").write_text(json.dumps(document), encoding="utf-8")
    found = workload(Recipe.load(file.with_suffix(".yaml")), 1, None)
    (kind,) = found.kinds.values()
    assert kind.steps == 9  # 20 rows in 3 batches, 3 epochs
    worst = kind.worst["retain"]["original"]
    assert worst.rows == 8
    assert 2 * worst.rows * worst.width < kind.tokens / 3 <= 3 * worst.rows * worst.width
