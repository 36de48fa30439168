"""The README's examples, executed as they stand."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import small_tokenizer, synthetic_pairs, tiny_model

from unlearn_llm.encode import Encoder
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.optim import DualAdamWPlus
from unlearn_llm.recipe import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(YAML_OF_A_SUITE,) = re.findall(r"```yaml\n(# my_suite.*?)```", README, flags=re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def the_block(containing: str) -> str:
    (block,) = [block for block in PYTHON if containing in block]
    return block


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with forget.jsonl, retain.jsonl and a model, as a user would have."""
    monkeypatch.chdir(tmp_path)
    for name, split in (("forget", "forget10"), ("retain", "retain90")):
        rows = [pair._asdict() for pair in synthetic_pairs(split)[:40]]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tiny_model().save_pretrained("model")
    small_tokenizer().save_pretrained("model")
    return tmp_path


def test_the_ten_lines_of_python_train_a_model(folder):
    code = the_block("UnlearnTrainer(").replace("max_steps=300", "max_steps=2")
    names = {"path": str(folder / "model"), "output_dir": str(folder / "run")}
    exec(code, names)
    assert names["trainer"].state.global_step == 2
    assert isinstance(names["trainer"].optimizer.optimizer, DualAdamWPlus)


def test_the_optimiser_works_in_a_bare_loop():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    exec(the_block("import DualAdamWPlus"), {"model": model})
    assert not torch.equal(model.weight, before)


def test_a_loss_from_a_users_own_file_is_found_by_its_name(folder):
    Path("my_losses.py").write_text(the_block("@forget_loss"), encoding="utf-8")
    (override,) = re.findall(r"train\.objective=my_\S+", README)
    script = Path(sys.executable).with_name("unlearn")  # which does not look into this folder
    command = [str(script), "show", "synthetic/unlearn", override]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "objective: my_losses:my_ga+gd" in shown.stdout


def test_a_combination_from_a_users_own_file_makes_the_steps(folder, monkeypatch):
    Path("my_combinations.py").write_text(the_block("class HalfForget"), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    (name,) = re.findall(r"train\.combine=(my_\S+)", README)
    code = the_block("UnlearnTrainer(").replace(
        'optimizer="dual_adamw_plus", max_steps=300',
        f'schedule="joint", combine="{name}", max_steps=2',
    )
    names = {"path": str(folder / "model"), "output_dir": str(folder / "run")}
    exec(code, names)
    logged = names["trainer"].combining.combination.observations()
    expected = 0.5 if logged["combine/cosine"] < 0 else 1.0
    assert logged["combine/forget_coefficient"] == expected
    assert names["trainer"].state.global_step == 2


def test_a_metric_from_a_users_own_file_is_a_score(folder, monkeypatch):
    Path("my_metrics.py").write_text(the_block("def words"), encoding="utf-8")
    Path("my_suite.yaml").write_text(YAML_OF_A_SUITE, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    model, encoder = tiny_model(), Encoder(small_tokenizer(), "plain")
    suite = Suite.load("my_suite.yaml", limit=3, max_new_tokens=5)
    evaluation = evaluate(suite, model, encoder)
    texts = [record["generation"]["text"] for record in evaluation.records]
    assert len(texts) == 3
    counted = [len(text.split()) for text in texts]
    assert evaluation.values["words"] == pytest.approx(sum(counted) / 3)


def test_every_recipe_named_in_a_command_exists():
    commands = [shlex.split(line, comments=True) for block in SHELL for line in block.splitlines()]
    named = [word for words in commands for word in words if word.startswith("tofu/")]
    assert named
    for name in named:
        Recipe.load(name)
