"""The table of all methods: nothing is missing in it, finished runs are kept, rows are readable."""

import json
import sys
from pathlib import Path

import measured_run
import methods
import pytest
import torch
from models_for_tests import make_trainer, small_tokenizer, tiny_model

from unlearn_llm.combine import COMBINATIONS
from unlearn_llm.errors import NonFiniteError, UserError
from unlearn_llm.masks import MASKS
from unlearn_llm.models import NewModel, new_model
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES
from unlearn_llm.optim import OPTIMIZERS
from unlearn_llm.recipe import Recipe
from unlearn_llm.schedule import SCHEDULES

GROUPS = [
    "forget loss",
    "forget loss alone",
    "retain loss",
    "combination",
    "schedule and optimiser",
    "vision",
]


@pytest.fixture(scope="module")
def recipes():
    return {name: Recipe.load(f"{methods.FAMILY}/{name}") for name in methods.names()}


@pytest.fixture
def task(tmp_path):
    return methods.Task("npo+kl", 0, tmp_path / "tofu", tmp_path / "out")


def row(**changed):
    return {
        "group": "forget loss",
        "objective": {"forget": [13.86, 2.0], "retain": [0.1, 0.25]},
        "moved": True,
        "seconds": 0.25,
        "passes": {"forward": 2.0, "backward": 1.0, "without": 0.1},
        "vectors": 2.0,
        "non_finite": None,
        **changed,
    }


def write(task, **changed):
    """What a finished run leaves."""
    settings = methods.settings(task.recipe())
    scores = {"UFE_proxy": 0.5, "MU18_proxy [other]": 0.75, "forget_quality": 0.01}
    evaluation = task.folder / "evaluation"
    evaluation.mkdir(parents=True)
    values = {name: {"value": value} for name, value in scores.items()}
    (evaluation / "scores.json").write_text(json.dumps({"scores": values}))
    (task.folder / "row.json").write_text(json.dumps(row(settings=settings, **changed)))


# The inventory.


def test_every_registered_method_has_a_row(recipes):
    objectives = [recipe.objective() for recipe in recipes.values()]
    assert {one.forget.name for one in objectives} == set(FORGET_LOSSES)
    assert {one.retain.name for one in objectives} == set(RETAIN_LOSSES)
    for setting, registry in (
        ("combine", COMBINATIONS),
        ("schedule", SCHEDULES),
        ("optimizer", OPTIMIZERS),
        ("mask", MASKS),
    ):
        used = {recipe.setting(setting) for recipe in recipes.values()}
        assert used - {None} == set(registry), setting


def test_every_row_belongs_to_a_group_in_order(recipes):
    groups = [recipe.about["group"] for recipe in recipes.values()]
    assert list(dict.fromkeys(groups)) == GROUPS
    assert groups == sorted(groups, key=GROUPS.index)


def test_every_row_says_in_its_name_what_it_is(recipes):
    for name, recipe in recipes.items():
        objective, _, scheme = name.partition("-")
        assert recipe.setting("objective").startswith(objective)
        if "+" not in objective:
            assert recipe.setting("schedule_parameters") == {"forget": 1, "retain": 0}
        schemes = [recipe.setting(key) for key in ("combine", "optimizer", "mask")]
        (chosen,) = [name for name in schemes if name] or ["alternate" if scheme else ""]
        assert scheme.startswith(chosen)


def test_every_row_is_sixty_steps_of_the_same_rows_and_scores(recipes):
    assert {recipe.train["max_steps"] for recipe in recipes.values()} == {60}
    assert len({recipe.train["per_device_train_batch_size"] for recipe in recipes.values()}) == 1
    suites = [recipe.suite() for recipe in recipes.values()]
    assert {(suite.split, suite.limit) for suite in suites} == {("forget05", 100)}


def test_rows_of_optimisers_differ_in_the_optimiser_only(recipes):
    group = [r for r in recipes.values() if r.about["group"] == "schedule and optimiser"]
    rates = {(r.train["learning_rate"], r.train["forget_learning_rate"]) for r in group}
    assert len(rates) == 1
    assert {str(r.train["schedule_parameters"]) for r in group} == {
        "{'forget': 1, 'retain': 5}",
    }


def test_rows_of_retain_losses_differ_in_the_retain_loss_only(recipes):
    group = [r for r in recipes.values() if r.about["group"] == "retain loss"]
    assert {r.objective().retain.name for r in group} == set(RETAIN_LOSSES)
    assert len({(r.objective().forget.name, r.train["learning_rate"]) for r in group}) == 1


# What is kept.


def test_a_finished_run_is_not_run_again(task):
    assert methods.finished(task) is None
    write(task)
    assert methods.finished(task)["objective"]["forget"] == [13.86, 2.0]


def test_a_run_with_other_settings_is_not_finished(task, monkeypatch):
    write(task)
    load = Recipe.load
    monkeypatch.setattr(
        Recipe,
        "load",
        lambda name, given=(): load(name, [*given, "train.learning_rate=1e-5"]),
    )
    assert methods.finished(task) is None


def test_only_missing_runs_are_started(task, monkeypatch, capsys):
    started = []
    write(task)

    def run(other):
        started.append(other.name)
        write(other)
        return other

    class AtOnce:
        """A pool that runs in this process."""

        def __init__(self, jobs, mp_context):
            self.map = map

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    models = {"target": {"seeds": 1}, "gold": {"seeds": 1}}
    monkeypatch.setattr(methods, "run", run)
    monkeypatch.setattr(methods, "prepare", lambda *_: None)
    monkeypatch.setattr(methods, "ProcessPoolExecutor", AtOnce)
    of_runs = methods.scores_of
    monkeypatch.setattr(
        methods, "scores_of", lambda folders: models.get(folders[0].name) or of_runs(folders)
    )
    words = ["--tofu", str(task.tofu), "--output", str(task.output), "--json"]
    monkeypatch.setattr(sys, "argv", ["methods.py", *words, "--only", "npo+kl", "me+gd"])
    methods.main()
    assert started == ["me+gd"]
    table = json.loads(capsys.readouterr().out)
    assert list(table) == ["target", "gold", "npo+kl", "me+gd"]
    assert table["me+gd"]["UFE_proxy"] == {"mean": 50.0, "std": 0.0}


def test_the_forget_set_of_altpo_is_the_one_that_was_made(tmp_path):
    task = methods.Task("altpo+gd", 0, tmp_path, tmp_path / "out")
    assert task.recipe().data.forget == str(tmp_path / "out" / methods.ALTERNATES)


# The table.


def test_the_table_shows_scores_losses_and_costs(task):
    write(task)
    table = {"target": {"group": "models", "seeds": 1}, "npo+kl": methods.row_of([task])}
    lines = methods.markdown(table).splitlines()
    assert lines[0].startswith("|  | UFE_proxy | MU18_proxy | forget_quality | forget loss |")
    assert lines[2].startswith("| *models* |")
    assert lines[5] == (
        "| npo+kl | 50.00 | 75.00 | 1e-02 | 13.9 → 2 | 0.1 → 0.25 | 0.25 | 2, 1, 0.1 | 2.0 |"
    )
    assert lines[-1] == "Similarity by other."
    assert len({line.count("|") for line in lines[:6]}) == 1


def test_a_loss_that_moved_the_wrong_way_is_named(task):
    write(task, moved=False)
    assert "13.9 → 2 (wrong way)" in methods.markdown({"npo+kl": methods.row_of([task])})


def test_a_retain_loss_is_shown_beside_that_without_it(task):
    objective = {"forget": [1.0, 0.5], "retain": [0.0, 0.25], "retain_without": 1.5}
    write(task, objective=objective)
    assert "0 → 0.25 (1.5 without)" in methods.markdown({"npo+kl": methods.row_of([task])})


def test_a_run_that_stopped_is_named_and_has_no_scores(task):
    write(task, non_finite="Step 3: the forget loss is nan")
    table = {"npo+kl": methods.row_of([task])}
    assert table["npo+kl"]["non_finite"] == ["Step 3: the forget loss is nan"]
    assert "not finite: stopped" in methods.markdown(table)


def test_the_table_replaces_what_stands_between_its_marks(task):
    write(task)
    table = {"npo+kl": methods.row_of([task])}
    opening, closing = methods.MARKS
    text = methods.with_table(f"a\n{opening}\nold\n{closing}\nb\n", table)
    assert text == f"a\n{opening}\n{methods.markdown(table)}\n{closing}\nb\n"
    assert methods.with_table(text, table) == text
    with pytest.raises(UserError, match="no place for the table"):
        methods.with_table("a", table)


def test_the_readme_has_a_place_for_the_table():
    readme = Path(__file__).parents[1] / "README.md"
    assert [readme.read_text(encoding="utf-8").count(mark) for mark in methods.MARKS] == [1, 1]


# A run that looks at itself.


def test_a_watched_run_counts_and_takes_the_losses_of_the_trainer(tmp_path):
    watch = measured_run.Watch()
    # Of a shape of its own: another test's model would be counted as a vector, were it still alive.
    size = NewModel(family="llama", hidden_size=40, layers=2, heads=2, context=256)
    model = new_model(size, small_tokenizer(), seed=0)
    trainer = make_trainer(tmp_path, model, objective="npo+kl", schedule="joint", max_steps=3)
    trainer.add_callback(watch)
    watch.trainer = trainer
    trainer.train()
    forget, retain = watch.losses["forget"], watch.losses["retain"]
    # At the start npo is (2/beta) log 2 and kl is 0.
    assert forget[0] == pytest.approx(20 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert retain[0] == pytest.approx(0, abs=1e-6)
    assert forget[1] < forget[0] and retain[1] > retain[0]
    # The reference of kl is a frozen copy; AdamW has two moments.
    assert watch.passes.counts == {"forward": 6, "backward": 3, "without": 3}
    assert watch.vectors == pytest.approx(3, rel=1e-3)
    assert watch.seconds > 0


@pytest.mark.parametrize(("name", "named"), measured_run.UNWEIGHTED.items())
def test_a_loss_with_detached_weights_is_measured_without_them(tmp_path, name, named):
    values = []
    for loss in (name, named):
        trainer = make_trainer(tmp_path, objective=f"{loss}+gd", max_steps=1)
        trainer.referring.prepare(None)
        values.append(measured_run.fixed_loss(trainer, "forget"))
    assert values[0] == values[1]


@pytest.fixture
def short(tmp_path):
    """Gives a row's recipe with two steps on generated authors."""
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    given = [
        "data.forget=synthetic/forget10",
        "data.retain=synthetic/retain90",
        f"model.path={model}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.max_steps=2",
        "train.warmup_steps=0",
        "train.report_to=none",
        "train.use_cpu=true",
        "evaluate.suite=synthetic",
        "evaluate.overrides={limit: 4, max_new_tokens: 8}",
        "evaluate.reference=null",
    ]
    return lambda name: Recipe.load(f"{methods.FAMILY}/{name}", given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["npo+kl", "me+gd-ngdiff", "me+gd-dual_adamw_plus"])
def test_a_row_is_made_of_a_recipe(short, name):
    recipe = short(name)
    made = measured_run.measured_run(recipe)
    assert made["non_finite"] is None
    assert made["moved"] == (made["objective"]["forget"][1] < made["objective"]["forget"][0])
    assert ("retain_without" in made["objective"]) == (name == "npo+kl")
    assert made["passes"]["backward"] == (2 if "ngdiff" in name else 1)
    scores = json.loads((recipe.output_dir / "evaluation" / "scores.json").read_text())["scores"]
    assert scores["UFE_proxy"]["value"] is not None
    json.dumps(made, allow_nan=False)


def test_a_run_that_diverges_says_why_and_is_not_evaluated(short, monkeypatch):
    def diverge(_):
        raise NonFiniteError("Step 3: the forget loss is nan")

    monkeypatch.setattr(measured_run.UnlearnTrainer, "train", diverge)
    recipe = short("ga+gd")
    assert measured_run.measured_run(recipe) == {"non_finite": "Step 3: the forget loss is nan"}
    assert not (recipe.output_dir / "evaluation").exists()
