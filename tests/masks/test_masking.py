"""Masks in the Trainer's step: what is held, what they are chosen from, checkpoints, costs."""

import gc

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import (
    SAVING,
    EveryStep,
    history,
    small_tokenizer,
    synthetic_pairs,
    tiny_model,
    weights,
)
from models_for_tests import make_trainer as make_trainer_of_all_rows
from test_equivalence import SPLITS, assert_same_run

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.masking import RowGradients
from unlearn_llm.masks import MASKS, Mask
from unlearn_llm.objective import RETAIN_LOSSES, Loss, Objective

SALUN = {"mask": "salun", "objective": "idk+gd"}
SFRON = {"mask": "sfron", "objective": "ga+gd"}
OPTIMIZERS = {
    "adamw": {},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "dual_adamw": {"optimizer": "dual_adamw"},
    "dual_adamw_plus": {"optimizer": "dual_adamw_plus", "optimizer_parameters": {"state_bits": 8}},
}


# A few, because sfron's pass has a batch of one row.
RETAIN = synthetic_pairs("retain90")[:12]


def make_trainer(output_dir, model=None, **settings):
    return make_trainer_of_all_rows(output_dir, model, retain=RETAIN, **settings)


def trained(output_dir, model=None, **settings):
    trainer = make_trainer(output_dir, model, **settings)
    trainer.train()
    return trainer


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def steps_of(tmp_path, model=None, **settings):
    """The trainer after training, and by step what the optimiser found and what it left."""
    trainer = make_trainer(tmp_path, model, **settings)
    found, left = [], []

    def look(event, state, _):
        if event in ("before", "end"):
            (found if event == "before" else left).append(weights(trainer.model))

    trainer.add_callback(EveryStep(look))
    trainer.train()
    return trainer, found, left


# What is held.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_salun_holds_entries_in_every_step_and_moves_the_others(tmp_path, name):
    start = weights(tiny_model())
    trainer = trained(tmp_path, **SALUN, **OPTIMIZERS[name], weight_decay=0.1)
    mask, end = flat(trainer.masking.mask), weights(trainer.model)
    assert int(mask.sum()) == len(mask) // 2
    assert torch.equal(end[~mask], start[~mask])
    assert (end[mask] != start[mask]).float().mean() > 0.999


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sfron_holds_entries_in_forget_steps_only(tmp_path, name):
    # Momentum of the retain steps, and the base of DualOptim+, would move them in forget steps.
    trainer, found, left = steps_of(tmp_path, **SFRON, **OPTIMIZERS[name], weight_decay=0.1)
    mask = flat(trainer.masking.mask)
    for step, (before, after) in enumerate(zip(found, left, strict=True)):
        moved = before != after
        assert moved[mask].float().mean() > 0.9, step  # some by less than float32 keeps
        assert moved[~mask].any() == (step % 3 != 0), step


def test_a_mask_that_lets_everything_move_changes_nothing(tmp_path):
    runs = [
        trained(tmp_path, mask=mask, mask_parameters=parameters)
        for mask, parameters in ((None, {}), ("salun", {"share": 1.0}))
    ]
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))


def test_a_masked_step_of_plain_descent_is_the_masked_gradient(tmp_path):
    # lr * gradient where the mask is, clipped by the norm of what is left of the gradient.
    plain = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0, "learning_rate": 0.1}
    start = weights(tiny_model())
    free = trained(tmp_path, **plain, objective="idk+gd", max_grad_norm=0.0)
    masked = trained(tmp_path, **plain, **SALUN, max_grad_norm=0.01)
    gradient = (start - weights(free.model)) * flat(masked.masking.mask) / 0.1
    assert history(masked, "forget/grad_norm")[0] == pytest.approx(float(gradient.norm()), rel=1e-4)
    moved = start - weights(masked.model)
    expected = 0.1 * gradient * 0.01 / gradient.norm()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6 * float(start.abs().max()))


@pytest.mark.parametrize("settings", [SALUN, SFRON], ids=["salun", "sfron"])
def test_masked_steps_do_not_depend_on_how_they_are_split(tmp_path, settings):
    runs = [
        trained(
            tmp_path,
            **settings,
            max_steps=4,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        for micro, accumulation in SPLITS
    ]
    for run in runs[1:]:
        assert_same_run(run, runs[0])


@pytest.mark.parametrize(
    "combine",
    [None, "surgery", "ngdiff", "implicit_surgery", pytest.param("ofmu", marks=pytest.mark.slow)],
)
def test_joint_steps_are_masked_and_so_are_the_gradients_they_combine(tmp_path, combine):
    start = weights(tiny_model())
    trainer = make_trainer(tmp_path, **SALUN, schedule="joint", combine=combine, max_steps=2)
    gradient, seen = trainer.combining.gradient, []
    trainer.combining.gradient = lambda role: seen.append(flat(gradient(role))) or gradient(role)
    trainer.train()
    mask = flat(trainer.masking.mask)
    assert torch.equal(weights(trainer.model)[~mask], start[~mask])
    assert bool(seen) == (combine in ("surgery", "ofmu", "ngdiff"))
    assert not any(each[~mask].any() for each in seen)


def test_of_a_fresh_adapter_the_b_matrices_are_chosen_first(tmp_path):
    # The A matrices have no gradient while B is 0.
    model = tiny_model(lora=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    trainer = trained(tmp_path, model, mask="salun", mask_parameters={"share": 0.1})
    chosen = {name: mask for name, mask in zip(names, trainer.masking.mask, strict=True)}
    assert not any(mask.any() for name, mask in chosen.items() if "lora_A" in name)
    trainer = trained(tmp_path, tiny_model(lora=True), mask="sfron")
    chosen = {name: mask for name, mask in zip(names, trainer.masking.mask, strict=True)}
    assert all(mask.all() for name, mask in chosen.items() if "lora_A" in name)


def test_bfloat16_autocast_trains_what_the_mask_lets(tmp_path):
    start = weights(tiny_model())
    trainer = trained(tmp_path, **SALUN, bf16=True)
    mask = flat(trainer.masking.mask)
    assert torch.equal(weights(trainer.model)[~mask], start[~mask])


def kink(policy):
    # sqrt has slope infinity at 0: a finite loss with a gradient of 0 * infinity.
    return (0 * policy["original"].logp).abs().sqrt()


def test_a_gradient_that_is_not_finite_still_stops_the_run(tmp_path):
    objective = Objective(Loss("kink", kink, ("original",), "token"), RETAIN_LOSSES["gd"])
    trainer = make_trainer(tmp_path, mask="salun", given={"objective": objective})
    before = weights(trainer.model)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


# What masks are chosen from.


def answer_gradients(model, role):
    """By row: gradient of S with transformers' own labels, and the number of tokens."""
    pairs = RETAIN if role == "retain" else synthetic_pairs("forget10")
    encoder = Encoder(small_tokenizer(), "plain")
    for row in encoder.pairs([p.question for p in pairs], [p.answer for p in pairs]):
        ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
        logits = model(input_ids=ids).logits[0, :-1].double()
        loss = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        yield flat(gradients).double(), int((labels[0, 1:] != -100).sum())


@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_gradients_are_those_of_rows_one_by_one(tmp_path, role, batch_size):
    model = tiny_model("phi").train()  # untied, and its answers are not what idk+gd reads
    trainer = make_trainer(tmp_path, model, **SALUN, per_device_train_batch_size=batch_size)
    found = list(answer_gradients(model, role))
    gradients = RowGradients(trainer, trainer.masking.rows)
    mean = sum(gradient for gradient, _ in found) / sum(length for _, length in found)
    square = sum(gradient**2 for gradient, _ in found) / len(found)
    # float32 of the forward pass, relative to the largest entries.
    for ours, theirs in ((gradients.mean, mean), (gradients.mean_square, square)):
        apart = (flat(ours(role)) - theirs).abs()
        assert apart.max() <= 2e-6 * theirs.abs().max()
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_the_masks_are_those_of_these_gradients(tmp_path):
    model = tiny_model()
    forget, retain = (list(answer_gradients(model, role)) for role in ("forget", "retain"))
    mean = sum(gradient for gradient, _ in forget) / sum(length for _, length in forget)
    fisher = [sum(g**2 for g, _ in found) / len(found) for found in (forget, retain)]
    wanted = {"salun": mean.abs() >= mean.abs().quantile(0.5), "sfron": fisher[0] >= fisher[1]}
    for name, expected in wanted.items():
        trainer = trained(tmp_path, tiny_model(), mask=name, max_steps=1)
        # The threshold falls between two entries that differ by less than float32 keeps.
        assert (flat(trainer.masking.mask) != expected).float().mean() < 2e-4, name


def test_dropout_does_not_change_the_mask(tmp_path):
    masks = []
    for p in (0.0, 0.5):
        model = tiny_model("phi")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p
        masks.append(flat(trained(tmp_path, model, **SALUN, max_steps=1).masking.mask))
    assert torch.equal(*masks)


# Checkpoints.


@pytest.mark.parametrize(("settings", "lora"), [(SALUN, False), (SFRON, True)])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, settings, lora):
    run = {**settings, "save_strategy": "steps", "save_steps": 2, "optimizer": "dual_adamw_plus"}
    whole = trained(tmp_path, tiny_model(lora=lora), **run)
    resumed = make_trainer(tmp_path, tiny_model(lora=lora), **run)
    resumed.masking.chooser.choose = None  # is not called: the mask is read
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(map(torch.equal, resumed.masking.mask, whole.masking.mask))
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_keeps_one_bit_per_entry_whole(tmp_path):
    trainer = trained(tmp_path, **SALUN, **SAVING)
    folder = tmp_path / "checkpoint-4"
    saved = torch.load(folder / "unlearn_mask.pt", weights_only=True)
    assert saved["mask"] == "salun"
    sizes = [-(-mask.numel() // 8) for mask in trainer.masking.mask]
    assert [len(bits) for bits in saved["bits"]] == sizes
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("saved", "resumed"), [("salun", "sfron"), ("salun", None), (None, "sfron")]
)
def test_a_checkpoint_of_another_mask_is_refused(tmp_path, saved, resumed):
    trained(tmp_path, mask=saved, **SAVING)
    other = make_trainer(tmp_path, mask=resumed, **SAVING)
    with pytest.raises(UserError, match=f"made with mask={saved!r}, this run has {resumed!r}"):
        other.train(resume_from_checkpoint=True)


# Passes and memory, measured: the README's table.

# Forward and backward passes before step one, in rows of a micro-batch of 10 forget and 12 retain
# rows; tensors of the size of the weights then, with the gradient; copies of the weights while the
# optimiser steps; bytes of the mask per entry.
COSTS = {"salun": ((1, 1), 1, 1, 1), "sfron": ((22, 22), 3, 1, 1)}


@pytest.mark.parametrize("name", COSTS)
def test_passes_and_memory_are_those_of_the_table(tmp_path, name, monkeypatch):
    passes, tensors, copies, mask_bytes = COSTS[name]
    gc.collect()  # what earlier tests left
    trainer = make_trainer(
        tmp_path, mask=name, objective="ga+gd", max_steps=3, per_device_train_batch_size=12
    )
    counts = {"forward": 0, "backward": 0}
    largest = max(trainer.model.parameters(), key=torch.Tensor.numel)
    alive, before_step_one = [], []

    def found(known):
        """Float32 tensors of the largest parameter's shape, without those that are known."""
        own = {t.data_ptr() for t in known}
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        alike = [t for t in tensors if t.shape == largest.shape and t.dtype == torch.float32]
        return len({t.data_ptr() for t in alike} - own)

    def count(what):
        counts[what] += 1
        if counts[what] == passes[1]:  # the last one before step one
            gradient = largest.grad  # noqa: F841  only what was asked for has a Python object
            before_step_one.append(found([largest]))

    def look(event, state, _):
        if event == "before":
            moments = [v for s in trainer.optimizer.state.values() for v in s.values()]
            alive.append(found([largest, largest.grad, *moments]))

    trainer.model.register_forward_pre_hook(lambda *_: count("forward"))
    tensor_backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *a, **k: (tensor_backward(*a, **k), count("backward"))[0]
    )
    trainer.add_callback(EveryStep(look))
    trainer.train()
    # A step is one pass each, as without a mask.
    assert (counts["forward"] - 3, counts["backward"] - 3) == passes
    assert max(before_step_one) == tensors
    held = [copies if "retain" in MASKS[name].roles or step == 0 else 0 for step in range(3)]
    assert alive == held
    entries = sum(p.numel() for p in trainer.model.parameters())
    kept = sum(mask.numel() * mask.element_size() for mask in trainer.masking.mask)
    assert kept == mask_bytes * entries


def test_every_mask_has_costs():
    assert set(COSTS) == set(MASKS)


def test_a_run_without_a_mask_keeps_nothing(tmp_path):
    trainer = trained(tmp_path)
    assert trainer.masking.rows is None
    assert trainer.masking.mask == []


# Extending, and what is refused.


class Biases(Mask):
    def choose(self, gradients):
        return [torch.ones_like(part, dtype=torch.bool) for part in gradients.mean("retain")]


def test_a_mask_of_ones_own_is_found_by_name_or_given(tmp_path):
    named = trained(tmp_path, mask=f"{__name__}:Biases", max_steps=2)
    given = trained(tmp_path, given={"mask": Biases()}, max_steps=2)
    assert torch.equal(weights(named.model), weights(given.model))
    assert given.masking.name == "Biases"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": "sfron", "schedule": "joint"}, "forget steps only.*Use schedule: alternate"),
        ({"mask": "salum"}, "Did you mean 'salun'"),
        ({"mask_parameters": {"share": 1}}, "mask names no mask"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **changed)
