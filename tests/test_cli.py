import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn_llm import cli, recipe_files
from unlearn_llm.cli_faults import fail
from unlearn_llm.evaluation.generator import Generator
from unlearn_llm.evaluation.scorer import Scorer

# A model small enough that making it, unlearning and measuring take seconds.
TARGET = """
kind: finetune
model: {new: {family: llama, hidden_size: 16, layers: 1, heads: 2, vocabulary: 300, context: 128}}
data: {train: [synthetic/forget05], template: plain, max_length: 128}
train: {output_dir: target, max_steps: 2, use_cpu: true, learning_rate: 1e-3}
"""
UNLEARN = """
model: {path: target, dtype: bfloat16}
data: {forget: synthetic/forget05, retain: synthetic/retain_perturbed, template: plain,
       max_length: 128}
train: {output_dir: unlearned, objective: ga+gd, max_steps: 2, per_device_train_batch_size: 2,
        schedule_parameters: {forget: 1, retain: 1}, use_cpu: true, save_steps: 1,
        learning_rate: 1e-3, optimizer: dual_adamw}
evaluate: {suite: synthetic, overrides: {limit: 2, max_new_tokens: 4}}
published: [{source: nobody, scores: {MU: 50.0}, tolerance: {MU: 60.0}}]
"""


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def unlearn(capsys, monkeypatch):
    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["unlearn", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "make_target.yaml").write_text(TARGET)
    (folder / "forget.yaml").write_text(UNLEARN)
    return folder


@pytest.fixture
def target(work, unlearn, monkeypatch) -> Path:
    """Stand in the work folder, with a target model in it."""
    monkeypatch.chdir(work)
    if not (work / "target").exists():
        made = unlearn("finetune", "make_target.yaml", "--json")
        assert made.code == 0, made.err
    return work


def refused(result: Result, *words: str) -> None:
    assert (result.code, result.out) == (2, "")
    lines = [line for line in result.err.splitlines() if "it/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0]


# Without a model.


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['unlearn', '--help']\n"
        "from unlearn_llm.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = ("train", "finetune", "eval", "compare", "demo", "list", "show", "copy")
    for command in (*commands, "leaderboard", "plot", "export", "import", "merge", "env"):
        assert f"  {command} " in done.stdout


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "unlearn_llm", "show", "tofu/phi"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no recipe 'tofu/phi'.")


def test_list_as_json_has_exactly_the_promised_keys(unlearn):
    listed = json.loads(unlearn("list", "--json").out)
    assert list(listed) == [
        "objectives",
        "schedules",
        "combines",
        "masks",
        "optimizers",
        "metrics",
        "suites",
        "recipes",
    ]
    assert list(listed["objectives"]) == ["forget", "retain"]
    assert {"idk", "me", "dpo", "npo"} <= set(listed["objectives"]["forget"])
    assert {"sum", "surgery", "ngdiff", "pdu"} <= set(listed["combines"])
    assert listed["optimizers"] == ["dual_adamw", "dual_adamw_plus"]
    assert {"tofu", "synthetic"} <= set(listed["suites"])
    assert listed["recipes"] == recipe_files.names()


def test_list_names_a_matrix_in_one_line(unlearn):
    lines = unlearn("list").out.splitlines()
    assert any("tofu/phi-1.5/{forget01|forget05|forget10}/" in line for line in lines)
    assert any(line.startswith("forget losses") and "idk" in line for line in lines)


def test_show_prints_what_copy_writes(unlearn, tmp_path):
    name = "tofu/llama-2-7b/forget01/me+gd/dual_adamw"
    shown = unlearn("show", name, "train.seed=3")
    assert shown.code == 0 and "\n  seed: 3\n" in shown.out
    file = tmp_path / "mine.yaml"
    copied = unlearn("copy", name, str(file), "train.seed=3")
    assert copied.code == 0
    body = shown.out[shown.out.index("name:") :]
    assert file.read_text().endswith(body)
    assert f"train {file}\n" in file.read_text()
    refused(unlearn("copy", name, str(file)), "exists")
    refused(unlearn("copy", name, str(tmp_path / "mine.txt")), "ends in .yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "synthetic/unlearnt"], ["Did you mean 'synthetic/unlearn'?"]),
        (["train", "synthetic/target"], ["use `unlearn finetune`"]),
        (["finetune", "synthetic/unlearn"], ["use `unlearn train`"]),
        (["train", "synthetic/unlearn", "--resume", "--overwrite"], ["give one of them"]),
        (["train", "synthetic/unlearn", "train.sed=1"], ["train.sed", "Did you mean 'seed'?"]),
        (["train", "synthetic/unlearn", "evaluate=null"], ["there is no folder outputs/"]),
        (
            ["train", "synthetic/unlearn", "data.forget=synthetic/forgot10", "evaluate=null"],
            ["forgot10"],
        ),
        (["train", "synthetic/unlearn", "data.retain=synthetic/full"], ["There is no file"]),
        (
            ["train", "synthetic/unlearn", "data.retain=synthetic/full", "evaluate=null"],
            ["40 forget rows also stand in the retain set"],
        ),
        (["train", "synthetic/unlearn", "data.forget=no.json", "evaluate=null"], ["no.json"]),
        (["train", "synthetic/unlearn", "train.x=\x1b[31m"], ["train.x"]),
        (["eval"], ["give models, or --from"]),
        (["eval", "./nowhere"], ["there is no folder"]),
        (["eval", "--from", "nowhere.jsonl"], ["There is no file nowhere.jsonl"]),
        (["eval", "m", "--suite", "tofoo"], ["m"]),
        (["compare", "nowhere", "elsewhere"], ["There is no file nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(unlearn, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    refused(unlearn(*arguments), *words)


def test_control_characters_are_escaped(capsys):
    with pytest.raises(SystemExit) as stopped:
        fail("a\x1b[31m\nb", 2)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a\\x1b[31m\\nb\n"


# With a tiny model.


def test_finetune_leaves_model_tokenizer_and_recipe_and_no_pickle(target):
    left = {path.name for path in (target / "target").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "recipe.yaml", "trainer_state.json"} <= left
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pth"))]
    assert json.loads((target / "target" / "config.json").read_text())["use_cache"] is True


def test_train_unlearns_saves_and_measures(unlearn, target):
    done = unlearn("train", "forget.yaml", "--overwrite", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)  # and nothing else on stdout
    assert result["folder"] == "unlearned"
    assert result["scores"]["MU9"]["value"] is not None
    assert [row["name"] for row in result["published"]] == ["MU"]
    folder = target / "unlearned"
    for name in ("model.safetensors", "recipe.yaml", "evaluation/records.jsonl"):
        assert (folder / name).is_file()

    # It trained in float32; what is saved has the dtype it was loaded in.
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"

    refused(unlearn("train", "forget.yaml"), "is not empty", "--resume", "--overwrite")
    resumed = unlearn("train", "forget.yaml", "train.seed=1", "--resume")
    refused(resumed, "train.seed", "Resume with the same recipe")

    scores = unlearn("eval", "--suite", "synthetic", "--json", "--from", str(folder / "evaluation"))
    (recomputed,) = json.loads(scores.out).values()
    assert recomputed["MU9"]["value"] == result["scores"]["MU9"]["value"]


def test_alternates_are_made_up_and_trained_on(unlearn, target, monkeypatch):
    # The model of this file reads 128 tokens, fewer than the whole prompt has here.
    monkeypatch.setattr("unlearn_llm.alternates.PROMPT", "{question}")
    options = ["--repeats", "1", "--max-new-tokens", "4"]
    made = unlearn("generate-alternates", "forget.yaml", "alternates.jsonl", *options)
    assert made.code == 0, made.err
    assert "rows to alternates.jsonl" in made.out
    names = ["data.forget=alternates.jsonl", "train.objective=altpo+gd", "evaluate=null"]
    run = unlearn("train", "forget.yaml", *names, "train.max_steps=1", "train.output_dir=altpo")
    assert run.code == 0, run.err


def test_eval_takes_the_template_from_the_run(unlearn, target):
    limits = ["limit=1", "max_new_tokens=2"]
    done = unlearn("eval", "target", "--suite", "synthetic", *limits, "--json", "--output", "out")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)) == {"target"}
    details = json.loads((target / "out" / "synthetic" / "target" / "scores.json").read_text())
    assert details["model"]["template"] == "plain"
    shown = unlearn("eval", "target", "--suite", "synthetic", *limits, "--output", "shown")
    assert "MU9" in shown.out


def test_a_run_that_diverges_exits_with_3(unlearn, target):
    done = unlearn(
        "train",
        "forget.yaml",
        "train.output_dir=diverged",
        "train.forget_weight=1e39",  # more than float32 holds
        "evaluate=null",
    )
    assert done.code == 3
    assert "Stopped before the weights changed" in done.err


def test_overwrite_spares_what_is_no_run_and_the_model_itself(unlearn, target):
    (target / "precious").mkdir(exist_ok=True)
    (target / "precious" / "thesis.txt").write_text("x")
    command = ["train", "forget.yaml", "--overwrite"]
    refused(unlearn(*command, "train.output_dir=precious"), "nothing is overwritten")
    refused(unlearn(*command, "train.output_dir=target"), "the same folder")


GOOD = {"question": "Who?", "answer": "Nobody."}


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        ([], [], ["forget.jsonl holds no rows"]),
        ([{"question": "Who?", "text": "x"}], [], ["question, text", "data.answer_column"]),
        ([GOOD, {"question": "Who?", "answer": " "}], [], ["answer without tokens (row 1)"]),
        (
            [{"question": "Who? " * 200, "answer": "x"}],
            [],
            ["question", "longer than max_length=128", "row 0"],
        ),
        (
            [GOOD, {"question": "Who? " * 100, "answer": "x"}],
            ["data.max_length=2000"],
            ["more tokens than the model reads, 128 (row 1)"],
        ),
        ([GOOD], ["data.template=chat"], ["a tokenizer with a chat template; this one has none"]),
        ([GOOD], ["train.objective=idkk+gd"], ["Did you mean 'idk'?"]),
        ([GOOD], ["train.objective=idk"], ["expected 'forget+retain'"]),
        (
            [GOOD],
            ["train.schedule=joint", "train.schedule_parameters={}"],
            ["dual_adamw keeps one state per role"],
        ),
        ([GOOD], ["data.retain=forget.jsonl"], ["1 forget rows also stand in the retain set"]),
    ],
)
def test_bad_rows_and_settings_are_told_before_weights_load(
    unlearn, target, rows, overrides, words
):
    (target / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["data.forget=forget.jsonl", "evaluate=null", "train.output_dir=refused", *overrides]
    refused(unlearn("train", "forget.yaml", *given), *words)
    assert not (target / "refused").exists()


def test_an_interrupted_evaluation_goes_on_by_itself(unlearn, target, monkeypatch):
    given = ["eval", "target", "--suite", "synthetic", "limit=2", "max_new_tokens=4"]
    generated = Generator.answer

    def interrupted(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "answer", interrupted)
    assert unlearn(*given, "--output", "cut").code != 0
    folder = Path("cut/synthetic/target")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == [
        "private",
        "private/answers-0.jsonl",
    ]
    monkeypatch.setattr(Generator, "answer", generated)
    monkeypatch.setattr(Scorer, "answer", interrupted)  # which has done its work
    assert unlearn(*given, "--output", "cut").code == 0
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert names == ["private", "private/records.jsonl", "records.jsonl", "scores.json"]


def test_an_earlier_evaluation_is_not_overwritten_unasked(unlearn, target):
    given = ["eval", "target", "--suite", "synthetic", "limit=1", "max_new_tokens=2"]
    assert unlearn(*given, "--output", "kept").code == 0
    refused(unlearn(*given, "--output", "kept"), "holds the scores of an earlier evaluation")
    assert unlearn(*given, "--output", "kept", "--overwrite").code == 0


def test_two_runs_are_compared_if_they_were_made_alike(unlearn, target):
    given = ["eval", "target", "--suite", "synthetic", "max_new_tokens=2", "--output"]
    for folder, more in (("one", "limit=6"), ("two", "data.template=llama2"), ("six", "limit=5")):
        assert unlearn(*given, folder, "limit=6", more, "intervals.by=row").code == 0
    one, two, six = (f"{folder}/synthetic/target" for folder in ("one", "two", "six"))
    refused(unlearn("compare", one, two), "not comparable", "template (plain and llama2)")
    refused(unlearn("compare", one, six), "limit (6 and 5)")
    draws = "intervals.resamples=100"
    shown = unlearn("compare", one, one, draws)
    assert shown.code == 0, shown.err
    assert "MU9" in shown.out and "+0.0000" in shown.out
    assert "of 20 equal scores one is below p = 0.05 by chance" in shown.out
    found = json.loads(unlearn("compare", one, one, draws, "--json").out)
    assert found["MU9"]["p_value"] == 1.0
    assert found["forget_quality"]["note"] == "no reference records given"
    gold = json.loads(unlearn("compare", one, one, draws, "--json", "--reference", one).out)
    assert gold["forget_quality"]["first"]["value"] == 1.0


def test_intervals_are_shown_when_asked_for(unlearn, target):
    given = ["eval", "target", "--suite", "synthetic", "limit=6", "max_new_tokens=2"]
    more = ["intervals.by=row", "intervals.resamples=100", "--output", "sure"]
    plain = unlearn(*given, *more)
    shown = unlearn("eval", "--from", "sure/synthetic/target", "--intervals")
    assert "[" not in plain.out and "[" in shown.out


@pytest.mark.parametrize("limit", ["0", "-1", "some"])
def test_a_limit_is_a_number_of_rows_or_all(unlearn, target, limit):
    refused(unlearn("eval", "target", "--suite", "synthetic", f"limit={limit}"), "limit")


def test_unlike_kinds_of_objective_are_told_beside_their_ovr(unlearn, target):
    limits = ["--suite", "synthetic", "limit=1", "max_new_tokens=2", "--output", "kinds"]
    for kind in ("targeted", "untargeted"):
        unlearn("eval", "target", *limits, f"objective_kind={kind}", "--overwrite")
        made = target / "kinds" / "synthetic" / "target"
        made.rename(target / "kinds" / kind)
    both = [str(target / "kinds" / kind) for kind in ("targeted", "untargeted")]
    shown = unlearn("eval", "--from", both[0], "--from", both[1])
    assert "OVR is not comparable here (targeted targeted, untargeted untargeted)" in shown.out
    alone = unlearn("eval", "--from", both[0])
    assert "not comparable" not in alone.out
