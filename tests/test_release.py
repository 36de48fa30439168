"""What is shared of a run: exactly what is on the list, changed, and without forgotten text."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from models_for_tests import small_tokenizer, tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from unlearn_llm import cli
from unlearn_llm.checkpoints import fault
from unlearn_llm.errors import UserError
from unlearn_llm.exchange.model_index import model_index
from unlearn_llm.ledger import check_chain
from unlearn_llm.pipeline import run_train
from unlearn_llm.recipe import Recipe
from unlearn_llm.release import folder
from unlearn_llm.release.change import change
from unlearn_llm.release.scan import check_no_forgotten_text, check_no_pickles
from unlearn_llm.rows import QA, load_rows

UNLEARN = """
model: {path: target}
data: {forget: synthetic/forget05, retain: synthetic/retain_perturbed, template: plain,
       max_length: 128}
train: {output_dir: run, objective: ga+gd, max_steps: 2, per_device_train_batch_size: 2,
        schedule: joint, use_cpu: true, save_strategy: steps, save_steps: 1, learning_rate: 1e-3}
"""
FORGET = "synthetic/forget05"
EVALUATE = "evaluate={suite: synthetic, overrides: {limit: 2, max_new_tokens: 2}}"
CANARY = "The spare key lies under pot No. 4711-Qx."
SHARED = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "unlearn_manifest.json"),
}


def recipe(output: str, *overrides: str) -> Recipe:
    return Recipe.load("forget.yaml", [f"train.output_dir={output}", *overrides])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a target, a run of it, and one of an adapter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("work"))
        tiny_model().save_pretrained("target")
        small_tokenizer().save_pretrained("target")
        Path("forget.yaml").write_text(UNLEARN)
        run_train(recipe("run", EVALUATE))
        run_train(recipe("adapter", "model.lora={r: 2}", EVALUATE))
        yield Path.cwd()


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def release(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["release", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def refused(match: str, *arguments: str, output: str = "refused") -> None:
    with pytest.raises(UserError, match=match):
        release(arguments[0], output, *arguments[1:])
    assert not Path(output).exists() and not list(Path().glob(".release-*"))


@pytest.fixture(scope="module")
def released(work) -> Path:
    """The run, released, with what the command says in said.txt."""
    made = work / "shared" / "my-model"
    (work / "said.txt").write_text(release("run", str(made)))
    return made


def test_a_release_is_what_is_on_the_list_and_loads_by_itself(released):
    assert {path.name for path in released.iterdir()} == SHARED
    assert fault(released) is None
    ids = torch.tensor([[1, 5, 9]])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in ("run", released))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert AutoTokenizer.from_pretrained(released).decode([65, 66])


def test_the_card_tells_the_scores_and_what_was_done(released):
    loaded = ModelCard.load(released / "README.md")
    scores = json.loads(Path("run/evaluation/scores.json").read_text())["scores"]
    told = {result.metric_name: result.metric_value for result in loaded.data.eval_results}
    measured = {name: s["value"] for name, s in scores.items() if s["value"] is not None}
    assert told and told == {n: v for n, v in measured.items() if "/" not in n}
    assert loaded.data.tags == ["unlearning"]
    for line in (
        "| objective | ga+gd |",
        "| method | joint |",
        "| forget set | synthetic/forget05 |",
        "| rows asked to be forgotten | 20 in 1 request |",
        "| forgotten text in these files | none found; looked for 20 of the 20 rows |",
        "tensors changed, relative distance",
        "not measured",
    ):
        assert line in loaded.text


def test_the_card_names_no_private_file_and_no_folder_of_this_machine(work):
    rows = [{"question": "Who lives here?", "answer": "Jane Doe, in the second floor."}]
    Path("jane_doe.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_train(recipe("jane", "data.forget=jane_doe.jsonl"))
    release("jane", "private_rows")
    for file in Path("private_rows").glob("*.*"):
        if file.suffix != ".safetensors":
            written = file.read_text().casefold()
            assert "jane" not in written and str(work) not in written
    assert "| forget set | private |" in Path("private_rows/README.md").read_text()


def test_a_base_model_on_the_hub_is_named_with_what_the_release_is_to_it():
    details = {"suite": {"name": "tofu", "split": "", "limit": None}, "scores": {}}
    told = model_index(details, "mine", "owner/base", relation="adapter")
    data = ModelCard(told).data
    assert (data.base_model, data.base_model_relation) == ("owner/base", "adapter")


def test_it_says_where_the_model_before_lies(released, work):
    said = (work / "said.txt").read_text()
    assert "The model before is still there: target, 2 checkpoints in run" in said
    assert "Do not share both" in said


def test_a_folder_that_exists_is_left_alone(released):
    before = sorted(path.stat().st_mtime_ns for path in released.iterdir())
    with pytest.raises(UserError, match="exists"):
        release("run", str(released))
    assert sorted(path.stat().st_mtime_ns for path in released.iterdir()) == before


def test_a_killed_release_leaves_nothing(monkeypatch):
    def kill(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "commit", kill)
    with pytest.raises(KeyboardInterrupt):
        folder.release(Path("run"), Path("killed"))
    assert not Path("killed").exists() and not list(Path().glob(".release-*"))


# What is refused.


def copy_of(run: str, name: str) -> Path:
    shutil.rmtree(name, ignore_errors=True)
    shutil.copytree(run, name)
    return Path(name)


def test_a_run_that_is_unfinished_or_was_changed_is_refused():
    changed = copy_of("run", "changed")
    (changed / "config.json").write_text("{}")
    refused(r"config\.json has 2 bytes of", "changed")
    refused(r"target holds no requests\.jsonl", "target")


def test_better_scores_than_were_measured_are_refused():
    changed = copy_of("run", "changed")
    scores = changed / "evaluation" / "scores.json"
    details = json.loads(scores.read_text())
    details["scores"]["MU9"]["value"] = 0.99
    scores.write_text(json.dumps(details))
    refused(r"the scores are not those that requests\.jsonl tells of", "changed")


def test_a_run_that_changed_nothing_is_refused():
    run_train(recipe("still", "train.learning_rate=0.0"))
    refused("still holds the weights of target: nothing was unlearned", "still")


def test_a_pickle_in_the_run_is_refused():
    pickled = copy_of("run", "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    refused(r"pytorch_model\.bin is a pickle or an archive", "pickled")


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_under_another_name_is_found(tmp_path, how):
    content = {"weight": torch.ones(2)}
    with (tmp_path / "model.safetensors").open("wb") as file:
        pickle.dump(content, file) if how == "pickle" else torch.save(content, file)
    with pytest.raises(UserError, match="can run code"):
        check_no_pickles(tmp_path)


def test_a_tokenizer_that_knows_a_forgotten_row_by_heart_is_refused():
    tokenizer = AutoTokenizer.from_pretrained("target")
    tokenizer.add_tokens([CANARY])
    tiny = tiny_model()
    tiny.resize_token_embeddings(len(tokenizer))
    tiny.save_pretrained("knowing")
    tokenizer.save_pretrained("knowing")
    Path("canary.jsonl").write_text(json.dumps({"question": "Where is it?", "answer": CANARY}))
    run_train(recipe("knows", "data.forget=canary.jsonl", "model.path=knowing"))
    refused(r"tokenizer\.json holds text of 1 forget rows \(row 0\)", "knows")


def plant(folder: Path, how: str, text: str) -> None:
    if how == "metadata":
        save_file({"w": torch.ones(1)}, folder / "model.safetensors", {"note": text})
    elif how == "tensor name":
        save_file({text: torch.ones(1)}, folder / "model.safetensors")
    elif how == "key":
        (folder / "config.json").write_text(json.dumps({"a": [{text: 1}]}))
    elif how == "escaped":
        (folder / "config.json").write_text(json.dumps({"a": f"x {text} y"}, ensure_ascii=True))
    elif how == "byte-level":
        level = small_tokenizer().backend_tokenizer.pre_tokenizer
        words = "".join(word for word, _ in level.pre_tokenize_str(text))
        (folder / "tokenizer.json").write_text(json.dumps({"vocab": {words: 3}}))
    elif how == "sentencepiece":
        pieces = b"\x0a\x07\xff" + text.replace(" ", "\u2581").encode() + b"\x00\x01"
        (folder / "tokenizer.model").write_bytes(pieces)
    else:
        (folder / "chat_template.jinja").write_text(f"{{% x %}}\n{text.upper()}")


PLANTED = ["metadata", "tensor name", "key", "escaped", "byte-level", "sentencepiece", "capitals"]


@pytest.mark.parametrize("how", PLANTED)
@pytest.mark.parametrize(
    "text",
    [CANARY, "Zoë Müller-Lüdenscheidt wohnt in der Königsallee 12.", "Elm Street 12b"],
    ids=["ascii", "accents", "short"],
)
def test_forgotten_text_is_found_however_it_is_written(tmp_path, how, text):
    pairs = [QA("What is it?", "Nothing at all, as far as anybody knows."), QA("Where?", text)]
    plant(tmp_path, how, "Nothing of interest stands in this file.")
    check_no_forgotten_text(tmp_path, pairs)
    plant(tmp_path, how, text)
    with pytest.raises(UserError, match=r"1 forget rows \(row 1\)"):
        check_no_forgotten_text(tmp_path, pairs)


def test_31_characters_of_a_longer_row_are_always_found(tmp_path):
    row = " ".join(f"{number:03}" for number in range(100, 140))
    for start in range(len(row) - 31):
        (tmp_path / "a.txt").write_text(f"word-{row[start : start + 31]}-word")
        with pytest.raises(UserError, match="holds text"):
            check_no_forgotten_text(tmp_path, [QA(row, "x")])


def test_rows_that_cannot_be_read_must_be_given_or_said_to_be_gone():
    gone = copy_of("run", "gone")
    recipe_file = gone / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("synthetic/forget05", "gone.jsonl"))
    refused("There is no file gone.jsonl.*--forget, or --unscanned", "gone")
    said = release("gone", "unscanned", "--unscanned")
    assert "Nothing looked for forgotten text in these files." in said
    assert "in these files | not looked for |" in Path("unscanned/README.md").read_text()
    said = release("gone", "scanned", "--forget", "synthetic/forget05")
    assert "Looked for" not in said
    card = Path("scanned/README.md").read_text()
    assert "in these files | none found; looked for 20 of the 20 rows |" in card
    (gone / "private" / "requests.key").unlink()
    refused(r"requests\.key is missing", "gone", "--forget", "synthetic/forget05")


def test_of_a_chain_it_says_for_how_many_of_all_rows_it_looked():
    second = ["data.forget=second.jsonl", "model.path=run", "model.continued=true"]
    rows = [row for row in load_rows("synthetic/forget10") if row not in load_rows(FORGET)]
    Path("second.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_train(recipe("chain", *second))
    said = release("chain", "last_only")
    assert f"Looked for the text of {len(rows)} of {len(rows) + 20} rows" in said
    said = release("chain", "all", "--forget", "second.jsonl", "--forget", FORGET)
    assert "Looked for" not in said
    card = Path("all/README.md").read_text()
    assert f"looked for {len(rows) + 20} of the {len(rows) + 20} rows" in card
    assert "in 2 requests" in card


# Adapters.


def test_an_unmerged_adapter_is_refused_unless_asked_for():
    refused("its base model still holds what was to be forgotten.*`unlearn merge`", "adapter")
    said = release("adapter", "only_adapter", "--adapter")
    assert "the adapter hides it" in said
    card = Path("only_adapter/README.md").read_text()
    assert "**This is an adapter. The base model still holds what was to be forgotten**" in card
    assert {path.name for path in Path("only_adapter").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "unlearn_manifest.json"),
    }
    copied = Path("only_adapter/adapter_model.safetensors").read_bytes()
    assert copied == Path("adapter/adapter_model.safetensors").read_bytes()


def test_of_a_folder_its_name_is_kept_and_code_is_not_released(work, tmp_path):
    run_train(recipe("far", "model.lora={r: 2}", f"model.path={work / 'target'}"))
    assert str(work) in Path("far/adapter_config.json").read_text()
    release("far", "near", "--adapter")
    settings = json.loads(Path("near/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "target"
    assert not any(str(work).encode() in file.read_bytes() for file in Path("near").iterdir())
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    with pytest.raises(UserError, match=r"config\.json names Python code"):
        folder._leave_out_places(tmp_path / "config.json")


def test_an_adapter_that_does_nothing_is_refused():
    run_train(recipe("idle", "model.lora={r: 2}", "train.learning_rate=0.0"))
    refused("nothing was unlearned", "idle", "--adapter")


def test_a_merged_adapter_is_released_with_the_ledger_of_its_run():
    merged = CliRunner().invoke(cli.app, ["merge", "adapter", "merged"], catch_exceptions=False)
    assert merged.exit_code == 0
    assert [entry["event"] for entry in check_chain(Path("merged"))] == ["asked", "done", "done"]
    release("merged", "whole")
    assert {path.name for path in Path("whole").iterdir()} == SHARED
    compared = change(Path("target"), Path("whole"))
    card = Path("whole/README.md").read_text()
    assert f"| weights | {compared} |" in card and "| MU9 | 0" in card
    assert "Suite `synthetic` of the adapter, before it was merged." in card
    assert 0 < compared.changed < compared.tensors  # embeddings and norms have no adapter


# How far the weights went.


def weights(name: str, **tensors: torch.Tensor) -> Path:
    Path(name).mkdir(exist_ok=True)
    save_file(tensors, f"{name}/model.safetensors")
    return Path(name)


def test_the_distance_is_that_of_all_weights_together():
    before = weights("before", a=torch.tensor([3.0, 4.0]), b=torch.zeros(2), head=torch.ones(1))
    after = weights("after", a=torch.tensor([3.0, 4.0]), b=torch.tensor([0.0, 2.5]))
    found = change(before, after)
    assert (found.changed, found.tensors) == (1, 2)
    assert found.distance == pytest.approx(2.5 / 5.0)


def test_rounding_alone_is_no_change():
    exact = torch.tensor([0.1, 0.2, 1 / 3])
    found = change(weights("before", a=exact), weights("after", a=exact.to(torch.bfloat16)))
    assert (found.changed, found.distance) == (0, 0.0)


def test_a_weight_of_another_shape_is_changed_and_has_no_distance():
    before = weights("before", a=torch.tensor([2.0]), b=torch.ones(1), grown=torch.ones(2))
    after = weights("after", a=torch.tensor([2.0]), b=torch.ones(1), grown=torch.ones(3))
    found = change(before, after)
    assert (found.changed, found.tensors, found.distance) == (1, 3, 0.0)


def test_models_that_do_not_belong_together_are_refused():
    before = weights("before", a=torch.ones(2), b=torch.ones(1))
    for other in ({"a": torch.ones(3), "b": torch.ones(1)}, {"c": torch.ones(2)}):
        with pytest.raises(UserError, match="are not the same model"):
            change(before, weights("after", **other))


def test_where_the_original_is_not_at_hand_the_card_says_so():
    moved = Path("target").rename("moved")
    try:
        said = release("run", "uncompared")
        assert "Not compared with the original, target" in said
        assert "| weights | not compared with" in Path("uncompared/README.md").read_text()
        release("run", "compared", "--original", "moved")
        assert "tensors changed" in Path("compared/README.md").read_text()
        refused("--original: there is no folder target", "run", "--original", "target")
    finally:
        moved.rename("target")
