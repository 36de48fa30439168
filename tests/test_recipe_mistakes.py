from pathlib import Path

import pytest

from unlearn_llm.errors import RecipeError
from unlearn_llm.recipe import Recipe


def refusal(overrides: list[str], recipe: str = "synthetic/unlearn") -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1e-5x", "train.learning_rate: expected a number, got '1e-5x'."),
        (
            "train.learning_rat=1e-5",
            "train.learning_rat: unknown key. Did you mean 'learning_rate'",
        ),
        ("train.max_steps=300.0", "train.max_steps: expected a whole number, got 300.0."),
        ("train.seed=true", "train.seed: expected a whole number, got true."),
        ("train.bf16=yes", "train.bf16: expected true or false, got 'yes'."),
        ("train.report_to=3", "train.report_to: expected text or a list, got 3."),
        ("train.lr_scheduler_type=cosin", "Did you mean 'cosine'?"),
        ("train.averaging=windov", "expected window or micro_batch, got 'windov'. Did you mean"),
        ("train.objective=simpno+gd", "Unknown forget loss 'simpno'. Did you mean 'simnpo'?"),
        ("train.objective=idk", "expected 'forget+retain' such as 'idk+ap', got 'idk'."),
        ("train.schedule=altrnate", "Unknown schedule 'altrnate'. Did you mean 'alternate'?"),
        ("train.schedule_parameters={forgt: 1}", "no parameter 'forgt'. Did you mean 'forget'?"),
        ("train.schedule_parameters={forget: x}", "train.schedule_parameters: "),
        ("train.combine=surgry", "Unknown combination 'surgry'. Did you mean 'surgery'?"),
        ("train.combine=surgery", "keeps one state per role"),
        ("train.combine_parameters={eps: 1}", "but train.combine is null"),
        ("train.optimizer=dual_adam", "Unknown optimizer 'dual_adam'. Did you mean 'dual_adamw'?"),
        ("train.optimizer_parameters={betaz: 1}", "Did you mean 'betas'?"),
        (
            "train.optimizer_parameters={betas: [0.9, 1.0]}",
            "expected two numbers from 0 to below 1",
        ),
        ("train.forget_parameters={beta: 1}", "The loss 'idk' has no parameter 'beta'."),
        ("train.hub_token=x", "train.hub_token: cannot be set in a recipe; "),
        ("train=3", "train: expected a mapping, got 3."),
        ("data.template=lama2", "data.template: expected chat, llama2"),
        ("data.forget=null", "data.forget: is missing"),
        ("data.train=[x]", "data.train: is read by kind: finetune only"),
        ("data.tokenizer_rows=[1]", "data.tokenizer_rows.0: expected text, got 1."),
        ("modl.path=x", "modl: unknown section. Did you mean 'model'?"),
        ("model.path=null", "model.path: is missing"),
        ("model.lora={r: '8'}", "model.lora.r: expected a whole number, got '8'."),
        ("model.new={famly: phi}", "model.new.famly: unknown key. Did you mean 'family'?"),
        ("evaluate.suite=tofoo", "Unknown suite 'tofoo'. Did you mean 'tofu'?"),
        ("evaluate.overrides={splitt: x}", "unknown key 'splitt'. Did you mean 'split'?"),
        ("kind=finetun", "kind: expected finetune or unlearn, got 'finetun'. Did you mean"),
        ("name=../../x", "name: expected parts such as tofu/mine, got '../../x'."),
        ("published=[{source: x}]", "published.scores: is missing."),
        ("train.seed", "expected key=value such as train.seed=2, got 'train.seed'."),
        ("train.seed.x=1", "train.seed.x: train.seed holds no keys of its own."),
    ],
)
def test_a_mistake_is_named_in_one_line(override, message):
    found = refusal([override])
    assert found.startswith("command line: ")
    assert message in found


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    path = write(
        tmp_path, "model: {path: m}\ndata: {}\ntrain: {learning_rate: fast}\nevaluate: null"
    )
    assert refusal([], str(path)) == f"{path}: train.learning_rate: expected a number, got 'fast'."


def test_a_dual_optimizer_with_a_joint_schedule_is_refused():
    joint = ["train.schedule=joint", "train.schedule_parameters={}"]
    found = refusal([*joint, "train.forget_learning_rate=null"])
    assert "dual_adamw_plus keeps one state per role" in found
    found = refusal([*joint, "train.optimizer=null"])
    assert "forget_learning_rate needs steps that train one role" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.combine_parameters={epz: 1}", "Surgery has no parameter 'epz'. Did you mean"),
        ("train.combine_parameters={eps: x}", "eps: expected a number from 0 to inf, got 'x'."),
        ("train.schedule=alternate", "combine: surgery needs steps that train both roles"),
        ("train.optimizer=dual_adamw", "combine: surgery needs both in one step"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(override, message):
    given = [override, "data.folder=nowhere"]
    assert message in refusal(given, "tofu/small/unlearn/idk+gd/surgery")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mask=sfrn", "Unknown mask 'sfrn'. Did you mean 'sfron'"),
        ("train.mask_parameters={treshold: 1}", "SFRon has no parameter 'treshold'. Did you mean"),
        ("train.mask_parameters={threshold: x}", "threshold: expected a number from 0 to inf"),
        ("train.mask=null", "train.mask_parameters"),
    ],
)
def test_a_mask_that_cannot_work_is_refused(override, message):
    assert message in refusal([override, "data.folder=nowhere"], "tofu/small/masks/sfron")


def test_a_mask_of_one_role_is_refused_where_steps_train_both(tmp_path):
    text = """
model: {path: m}
data: {forget: f.json, retain: r.json}
train: {schedule: joint, mask: sfron}
"""
    with pytest.raises(RecipeError, match=r"train.mask.*sfron holds entries in forget steps only"):
        Recipe.load(write(tmp_path, text))


def test_evaluation_steps_without_a_suite_are_refused():
    found = refusal(["evaluate=null", "train.eval_strategy=steps"])
    assert "train.eval_strategy: needs an evaluate section" in found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tofu/phy-1.5/forget05/idk+gd/joint",
            "Did you mean 'tofu/phi-1.5/forget05/idk+gd/joint'?",
        ),
        ("tofu/phi-1.5", "such as tofu/phi-1.5/forget01/idk+gd/joint; got none."),
        ("tofu/phi-1.5/forget01", "such as tofu/phi-1.5/forget01/idk+gd/joint; got forget01."),
        ("tofu/phi-1.5/forget01/idk+gd/dual_adam", "unknown scheme 'dual_adam'. Did you mean"),
        ("synthetic/unlearn/x", "holds no variants, so nothing may follow its name; got 'x'."),
        ("../pyproject", "There is no recipe '../pyproject'."),
        ("nothing.yaml", "There is no recipe 'nothing.yaml'."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    assert message in refusal([], name)
