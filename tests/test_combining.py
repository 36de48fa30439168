"""Combinations in the Trainer's step: split steps, checkpoints, passes, memory, what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from models_for_tests import SAVING, history, make_trainer, tiny_model, trained, weights
from test_equivalence import SPLITS, assert_same_run
from watching import Passes, live_vectors

from unlearn_llm.combine import COMBINATIONS
from unlearn_llm.combine.gradients import Projection
from unlearn_llm.combine.vectors import Coefficients
from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.objective import RETAIN_LOSSES, Loss, Objective

JOINT = {"schedule": "joint", "objective": "npo+gd", "max_steps": 4}
# On this objective the losses of some probes are a parabola, so the learning rate does move.
PROBING = {
    "combine": "ngdiff",
    "combine_parameters": {"probe_every": 2},
    "objective": "idk+ap",
}
SETTINGS = {
    "sum": {"combine": "sum"},
    "surgery": {"combine": "surgery"},
    "pcgrad": {"combine": "pcgrad"},
    "mgda": {"combine": "mgda", "combine_parameters": {"normalize": "l2"}},
    "ngdiff": PROBING,
    "blur": {"combine": "blur"},
    "gru": {"combine": "gru"},
    "implicit_surgery": {"combine": "implicit_surgery"},
    "implicit_surgery_fast": {"combine": "implicit_surgery_fast"},
    "pdu": {"combine": "pdu", "combine_parameters": {"initial": 1.0, "rate": 0.1}},
    "famo": {"combine": "famo", "objective": "idk+gd"},
    "ofmu": {"combine": "ofmu", "combine_parameters": {"inner_steps": 1}},
}
GRADIENTS = ["surgery", "pcgrad", "mgda", "ngdiff", "blur", "gru", "ofmu"]


def settings(name, **more):
    return {**JOINT, **SETTINGS[name], **more}


class Sum(Projection):
    """The two gradients added up: what a step without a combination does."""

    def coefficients(self, products):
        return Coefficients(1.0, 1.0)


def test_every_combination_is_tested_here():
    assert set(SETTINGS) == set(COMBINATIONS)


# What a step is.


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_gradients_added_up_are_the_joint_step(tmp_path, lora):
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs = [
        trained(tmp_path, tiny_model(lora=lora), **JOINT, **shape, forget_weight=0.5, given=given)
        for given in ({}, {"combine": Sum()})
    ]
    for key in ("forget/loss", "retain/loss", "grad_norm"):
        # float32 sums in another order, grown by some steps of training.
        assert history(runs[0], key) == pytest.approx(history(runs[1], key), rel=1e-4), key
    apart = weights(runs[0].model) - weights(runs[1].model)
    assert apart.norm() <= 1e-4 * weights(runs[1].model).norm()


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_do_not_depend_on_how_they_are_split(tmp_path, name):
    runs = [
        trained(
            tmp_path,
            **settings(name),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        for micro, accumulation in SPLITS
    ]
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


def test_a_first_step_of_surgery_does_not_raise_the_retain_loss(tmp_path):
    # Plain descent, so that the step is the direction: to first order the loss stands still, and
    # what is left is of second order in the learning rate.
    model = trained(tmp_path, objective="idk+gd", schedule="joint", max_steps=30).model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rises = {}
    for rate in (1e-2, 1e-3):
        for name in ("surgery", None):
            model.load_state_dict(state)
            trainer = make_trainer(
                tmp_path, model, **{**JOINT, "objective": "ga+gd", "max_steps": 1}, combine=name,
                optim="sgd", learning_rate=rate, max_grad_norm=0.0, retain_weight=1e-3,
                weight_decay=0.0,
            )  # fmt: skip
            trainer.train()
            after = trainer.combining.loss("retain")
            rises[name, rate] = after - history(trainer, "retain/loss")[0]
    assert rises[None, 1e-3] > 0  # there is a conflict
    assert abs(rises["surgery", 1e-3]) < 0.05 * rises[None, 1e-3]
    assert abs(rises["surgery", 1e-3]) < 0.03 * abs(rises["surgery", 1e-2])


@pytest.mark.parametrize("name", ["ngdiff", "implicit_surgery"])
def test_bfloat16_autocast_trains(tmp_path, name):
    trainer = trained(tmp_path, **settings(name), bf16=True)
    assert weights(trainer.model).isfinite().all()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["surgery", "pdu"])
def test_adapters_and_checkpointed_blocks_train_the_same(tmp_path, name):
    runs = [
        trained(
            tmp_path,
            tiny_model(lora=True),
            **settings(name),
            activation_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    ]
    assert_same_run(runs[0], runs[1])


def test_a_joint_step_without_a_combination_is_as_it_was(tmp_path):
    line = trained(tmp_path, **JOINT).state.log_history[0]
    assert not [key for key in line if key.startswith("combine/")]
    assert not {"forget/grad_norm", "retain/grad_norm"} & line.keys()


def test_norms_by_role_and_the_cosine_are_logged(tmp_path):
    trainer = trained(tmp_path, **settings("pcgrad"), logging_steps=1)
    alone = trained(tmp_path, **JOINT, retain_weight=0.0)
    key = "forget/grad_norm"
    assert history(trainer, key)[0] == pytest.approx(history(alone, "grad_norm")[0], rel=1e-5)
    assert all(-1 <= cosine <= 1 for cosine in history(trainer, "combine/cosine"))
    assert {"combine/forget_coefficient", "retain/grad_norm"} <= trainer.state.log_history[0].keys()


def test_the_automatic_rate_is_used_and_put_back(tmp_path):
    trainer = trained(tmp_path, **settings("ngdiff"))
    assert trainer.combining.combination.scale != 1
    # What a schedule reads.
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3}


# Gradients that are not finite.


def kink(policy):
    # sqrt has slope infinity at 0: a finite loss with a gradient of 0 * infinity.
    return (0 * policy["original"].logp).abs().sqrt()


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("role", ["forget", "retain"])
def test_a_gradient_of_one_role_that_is_not_finite_stops_the_run(tmp_path, name, role):
    good, bad = RETAIN_LOSSES["gd"], Loss("kink", kink, ("original",), "token")
    objective = Objective(bad, good) if role == "forget" else Objective(good, bad)
    trainer = make_trainer(tmp_path, **settings(name), given={"objective": objective})
    before = weights(trainer.model)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


# Checkpoints.


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, name):
    # Stopped between two probes of ngdiff.
    run = settings(name, max_steps=6, save_strategy="steps", save_steps=3)
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = trained(tmp_path, **run, **shape)
    resumed = make_trainer(tmp_path, **run, **shape)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for key in ("forget/loss", "combine/lambda", "combine/cosine", "combine/learning_rate_scale"):
        assert history(resumed, key) == history(whole, key), key


def test_the_state_is_written_whole_and_read_as_weights_only(tmp_path):
    trainer = trained(tmp_path, **settings("gru"), **SAVING)
    folder = tmp_path / "checkpoint-4"
    saved = torch.load(folder / "unlearn_combination.pt", weights_only=True)
    assert saved["combine"] == "gru"
    memory = trainer.combining.combination.state_dict()["memory"]
    assert all(map(torch.equal, saved["state"]["memory"], memory))
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(("saved", "resumed"), [("pdu", "famo"), ("pdu", None), (None, "pdu")])
def test_a_checkpoint_of_another_combination_is_refused(tmp_path, saved, resumed):
    trained(tmp_path, **JOINT, combine=saved, **SAVING)
    other = make_trainer(tmp_path, **JOINT, combine=resumed, **SAVING)
    with pytest.raises(UserError, match=f"made with combine={saved!r}, this run has {resumed!r}"):
        other.train(resume_from_checkpoint=True)


# Passes and memory, measured.

# Forward passes, backward passes and forward passes without gradient of a step in one micro-batch;
# gradients that are alive when the direction is made, beyond those of a plain step.
COSTS = {
    None: (2, 1, 0, 0),
    "sum": (2, 1, 0, 0),
    "surgery": (2, 2, 0, 1),
    "pcgrad": (2, 2, 0, 1),
    "mgda": (2, 2, 0, 1),
    "ngdiff": (2, 2, 1, 2),  # two more in every second step: probe_every is 2 here
    "blur": (2, 2, 0, 1),
    "gru": (2, 2, 0, 2),
    "implicit_surgery": (2, 1, 1, 0),
    "implicit_surgery_fast": (2, 1, 0, 0),
    "pdu": (2, 1, 0, 0),
    "famo": (2, 1, 0, 0),
    "ofmu": (15, 15, 0, 6),  # one inner step
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_passes_per_step_are_those_of_the_table(tmp_path, name, accumulation):
    run = settings(name) if name else JOINT
    trainer = make_trainer(
        tmp_path, **{**run, "objective": "idk+gd"}, gradient_accumulation_steps=accumulation
    )
    with Passes(trainer) as passes:
        trainer.train()
    times = 4 * accumulation  # four steps
    assert list(passes.counts.values()) == [n * times for n in COSTS[name][:3]]


def test_with_dropout_losses_before_and_after_a_step_are_taken_without_it(tmp_path):
    model = tiny_model("phi")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    trainer = make_trainer(tmp_path, model, **settings("implicit_surgery", max_steps=1))
    told, taken = [], []
    trainer.combining.combination.after_step = told.append
    loss = trainer.combining.loss
    trainer.combining.loss = lambda role: taken.append(loss(role)) or taken[-1]
    trainer.train()
    assert len(taken) == 1  # before; the one after is the combination's
    assert told[0].losses["retain"] == taken[0] != history(trainer, "retain/loss")[0]


@pytest.mark.parametrize("name", COSTS)
def test_vectors_in_memory_are_those_of_the_table(tmp_path, name, monkeypatch):
    # What lives between passes. A plain step has one, the gradient.
    trainer = make_trainer(tmp_path, **{**(settings(name) if name else JOINT), "max_steps": 2})
    most = [1.0]

    def look(function):
        def looked(*given):
            result = function(*given)
            most.append(live_vectors(trainer))
            return result

        return looked

    for method in ("gradient", "loss"):
        monkeypatch.setattr(trainer.combining, method, look(getattr(trainer.combining, method)))
    trainer.train()
    assert max(most) == 1 + COSTS[name][3]


# What is refused.


@pytest.mark.parametrize("optimizer", ["dual_adamw", "dual_adamw_plus"])
@pytest.mark.parametrize("schedule", ["joint", "alternate"])
def test_dual_optimisers_are_refused(tmp_path, optimizer, schedule):
    with pytest.raises(UserError, match=r"keeps one state per role.*combine: null"):
        make_trainer(tmp_path, combine="surgery", optimizer=optimizer, schedule=schedule)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule": "alternate"}, "steps that train both roles.*Use schedule: joint"),
        ({"combine": "surgry"}, "Did you mean 'surgery'"),
        ({"combine_parameters": {"epsilon": 1}}, "combine_parameters of 'surgery'"),
        ({"combine": None, "combine_parameters": {"eps": 1}}, "names no combination"),
        ({"combine": "pdu", "retain_weight": 2.0}, "retain_weight must be 1, got 2"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **{"schedule": "joint", "combine": "surgery", **changed})


def test_dropout_is_refused_where_gradients_are_compared(tmp_path):
    model = tiny_model()
    model.config.attention_dropout = 0.1
    with pytest.raises(UserError, match="which dropout makes random"):
        make_trainer(tmp_path, model, **settings("ofmu"))
    make_trainer(tmp_path, model, **settings("surgery"))


def test_meshes_of_two_dimensions_are_refused(tmp_path, monkeypatch):
    combining = make_trainer(tmp_path, **settings("surgery")).combining
    monkeypatch.setattr("unlearn_llm.combining.DTensor", SimpleNamespace)
    sharded = SimpleNamespace(device_mesh=SimpleNamespace(ndim=2))
    monkeypatch.setattr(type(combining), "parameters", [sharded])
    with pytest.raises(UserError, match="this mesh has 2 dimensions"):
        combining.reduce(torch.zeros(1))


def test_lambda_is_finite_after_a_run(tmp_path):
    trainer = trained(tmp_path, **settings("implicit_surgery"))
    assert all(map(math.isfinite, history(trainer, "combine/lambda")))
