"""Requests one after the other: what was forgotten before stays out, and the ledger tells."""

import base64
import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import small_tokenizer, synthetic_pairs, tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from unlearn_llm import cli, continuing, pipeline
from unlearn_llm.continuing import Request
from unlearn_llm.errors import UserError
from unlearn_llm.ledger import LEDGER, check_chain, read_key, read_ledger, row_hashes, rows_asked
from unlearn_llm.pipeline import run_train
from unlearn_llm.recipe import Recipe
from unlearn_llm.recipe_rows import forget_and_retain
from unlearn_llm.rows import QA

UNLEARN = """
model: {path: target}
data: {retain: kept.jsonl, template: plain, max_length: 128}
train: {objective: ga+gd, max_steps: 1, per_device_train_batch_size: 2, use_cpu: true,
        schedule: joint, save_strategy: "no", learning_rate: 1e-3}
"""
FIRST, SECOND, THIRD = (synthetic_pairs("forget10")[n : n + 3] for n in (0, 3, 6))
KEPT = synthetic_pairs("retain90")[:8]
REQUESTS = {"first": FIRST, "second": SECOND, "third": THIRD}


def write_rows(file: str, pairs) -> None:
    rows = [{"question": pair.question, "answer": pair.answer} for pair in pairs]
    Path(file).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def recipe(name: str, *overrides: str, after: str | None = None) -> Recipe:
    chain = [f"model.path={after}", "model.continued=true"] if after else []
    given = [f"data.forget={name}.jsonl", f"train.output_dir={name}", *chain, *overrides]
    return Recipe.load("forget.yaml", given)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with three requests to a tiny model, each upon the one before.

    Every retain set holds what was forgotten before, in other capitals and blanks.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("work"))
        tiny_model().save_pretrained("target")
        small_tokenizer().save_pretrained("target")
        Path("forget.yaml").write_text(UNLEARN)
        write_rows("kept.jsonl", KEPT)
        for name, pairs in REQUESTS.items():
            write_rows(f"{name}.jsonl", pairs)
        disguised = [QA(f" {p.question.upper()} ", p.answer.replace(" ", "  ")) for p in FIRST]
        write_rows("with_first.jsonl", [*KEPT, *disguised])
        write_rows("with_both.jsonl", [*disguised, *KEPT, *SECOND])
        run_train(recipe("first"))
        run_train(recipe("second", "data.retain=with_first.jsonl", after="first"))
        run_train(recipe("third", "data.retain=with_both.jsonl", after="second"))
        yield Path.cwd()


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def retained_by(made: Recipe) -> list[QA]:
    """What the trainer of a run gets as its retain set."""
    forget, retain = forget_and_retain(made.data)
    return Request(made, forget).keep_out(retain)


def test_the_third_request_retains_no_row_of_the_first_two(caplog):
    with caplog.at_level(logging.WARNING):
        kept = retained_by(recipe("third", "data.retain=with_both.jsonl", after="second"))
    assert kept == KEPT
    assert "6 retain rows are left out: earlier requests asked to forget them." in caplog.text


def test_the_trainer_gets_the_filtered_rows(monkeypatch):
    class Stopped(Exception):
        pass

    def look(model, args, *, forget_dataset, retain_dataset, **others):
        raise Stopped(forget_dataset, retain_dataset)

    monkeypatch.setattr(pipeline, "UnlearnTrainer", look)
    fourth = ("data.retain=with_both.jsonl", "data.forget=third.jsonl")
    with pytest.raises(Stopped) as stopped:
        run_train(recipe("fourth", *fourth, after="second"))
    assert stopped.value.args == (THIRD, KEPT)


def test_without_a_chain_the_same_rows_are_kept():
    _, retain = forget_and_retain(recipe("second", "data.retain=with_first.jsonl").data)
    assert len(retain) == len(KEPT) + len(FIRST)
    assert retained_by(recipe("second", "data.retain=with_first.jsonl")) == retain


def test_the_ledger_tells_of_all_requests_and_their_order():
    entries = check_chain(Path("third"))
    told = [(entry["request"], entry["event"]) for entry in entries]
    assert told == [(number, event) for number in (1, 2, 3) for event in ("asked", "done")]
    asked = [entry for entry in entries if entry["event"] == "asked"]
    assert [entry["parent"]["name"] for entry in asked] == ["target", "first", "second"]
    assert [entry["retain_rows_left_out"] for entry in asked] == [0, 3, 6]
    assert entries[:4] == read_ledger(Path("second"))
    key = read_key(Path("third"))
    assert key == read_key(Path("first"))
    assert rows_asked(entries) == set(row_hashes(key, [*FIRST, *SECOND, *THIRD]))


def test_the_ledger_holds_no_text_and_no_hash_that_can_be_guessed():
    written = (Path("third") / LEDGER).read_text()
    for pair in [*FIRST, *SECOND, *THIRD]:
        for text in (pair.question, pair.answer):
            assert text not in written
            assert base64.b64encode(text.encode()).decode()[:-4] not in written
            assert hashlib.sha256(text.encode()).hexdigest()[:32] not in written
    guessed = row_hashes(bytes(32), FIRST)  # who guesses the rows, but not the key
    assert not rows_asked(read_ledger(Path("third"))) & set(guessed)


def test_only_the_owner_reads_the_key():
    key = Path("first/private/requests.key")
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700


def copy_of(run: str, name: str) -> Path:
    shutil.rmtree(name, ignore_errors=True)
    shutil.copytree(run, name)
    return Path(name)


def refused(after: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        run_train(recipe("third", "train.output_dir=refused", after=str(after)))
    assert not Path("refused").exists()


def test_a_parent_with_other_weights_is_refused():
    changed = copy_of("second", "changed")
    (changed / "model.safetensors").write_bytes(Path("first/model.safetensors").read_bytes())
    refused(changed, r"changed is no finished run: model\.safetensors is not what was saved")
    for name in json.loads(Path("first/unlearn_manifest.json").read_text())["files"]:
        shutil.copy(Path("first") / name, changed / name)  # a whole model, but another one
    shutil.copy("first/unlearn_manifest.json", changed)
    refused(changed, r"the weights are not those that requests\.jsonl tells of")


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_ledger_with_an_entry_changed_or_taken_out_is_refused(line):
    changed = copy_of("second", "changed")
    lines = (changed / LEDGER).read_text().splitlines(keepends=True)
    (changed / LEDGER).write_text("".join(lines[:line] + lines[line + 1 :]))
    refused(changed, "an entry before it was changed or taken out")
    lines[line] = lines[line].replace('"request": ', '"request": 1')
    (changed / LEDGER).write_text("".join(lines))
    refused(changed, "an entry before it was changed or taken out")


def test_a_last_entry_taken_out_is_noticed_by_the_weights():
    changed = copy_of("second", "changed")
    lines = (changed / LEDGER).read_text().splitlines(keepends=True)
    (changed / LEDGER).write_text("".join(lines[:-1]))
    refused(changed, "its ledger ends before the request was done")
    (changed / LEDGER).write_text("".join(lines[:-2]))
    refused(changed, "the weights are not those")


def test_a_parent_without_ledger_or_key_is_refused():
    refused(Path("target"), r"target holds no requests\.jsonl")
    keyless = copy_of("first", "keyless")
    (keyless / "private" / "requests.key").write_text("short")
    refused(keyless, "does not hold 32 bytes")
    (keyless / "private" / "requests.key").unlink()
    refused(keyless, r"requests\.key is missing")


def test_a_key_of_somebody_else_is_told_in_one_line(monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:  # whoever runs the tests may be allowed everything
        patched.setattr(Path, "read_text", refuse)
        with pytest.raises(UserError, match=r"requests\.key cannot be read: Permission denied"):
            read_key(Path("first"))


def test_a_retain_set_of_forgotten_rows_only_is_refused():
    with pytest.raises(UserError, match="asked to forget every row"):
        retained_by(recipe("third", "data.retain=first.jsonl", after="second"))


def test_going_on_without_saying_so_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        retained_by(recipe("second", "model.path=first"))
    assert "first was unlearned before" in caplog.text and "--continue-from first" in caplog.text


def killed(monkeypatch, owner, name: str, *, resume: bool = False) -> None:
    def kill(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, kill)
        run_train(killed_recipe(), resume=resume)


def killed_recipe() -> Recipe:
    given = ("data.retain=with_both.jsonl", "train.output_dir=killed")
    return recipe("third", *given, after="second")


def test_a_run_that_is_killed_at_every_stage_has_the_ledger_of_an_undisturbed_one(monkeypatch):
    ledger = Path("killed") / LEDGER
    killed(monkeypatch, continuing.ledger, "write_key")  # the folder is begun, the ledger is not
    assert Path("killed/recipe.yaml").exists() and not ledger.exists()
    killed(monkeypatch, continuing.ledger, "write_ledger", resume=True)
    assert not ledger.exists()
    killed(monkeypatch, pipeline.UnlearnTrainer, "train", resume=True)
    asked = ledger.read_text()
    killed(monkeypatch, pipeline, "save_model", resume=True)
    with pytest.raises(UserError, match="Finish it with --resume"):
        check_chain(Path("killed"))
    killed(monkeypatch, continuing.Request, "done", resume=True)  # trained, and not recorded
    assert ledger.read_text() == asked
    (Path("killed") / ".requests.jsonl.0a1b2c3d").write_text('{"event": "as')  # half written
    run_train(killed_recipe(), resume=True)
    finished = ledger.read_text()
    run_train(killed_recipe(), resume=True)
    assert ledger.read_text() == finished and not list(Path("killed").glob(".*"))

    def timeless(run: str) -> list:
        untimed = ("time", "previous", "recipe")  # a recipe names its folder
        entries = check_chain(Path(run))
        return [{k: v for k, v in entry.items() if k not in untimed} for entry in entries]

    assert timeless("killed") == timeless("third")


def test_a_run_is_not_resumed_with_another_forget_set(monkeypatch):
    shutil.rmtree("killed", ignore_errors=True)
    killed(monkeypatch, pipeline.UnlearnTrainer, "train")
    rows = Path("third.jsonl").read_text()
    try:
        write_rows("third.jsonl", THIRD[:2])
        with pytest.raises(UserError, match="was begun with other forget rows"):
            run_train(killed_recipe(), resume=True)
    finally:
        Path("third.jsonl").write_text(rows)


def test_an_overwritten_run_has_a_ledger_of_its_own():
    run_train(recipe("first", "train.output_dir=anew"))
    before = read_key(Path("anew"))
    made = recipe("second", "train.output_dir=anew")
    run_train(made, overwrite=True)
    assert len(check_chain(Path("anew"))) == 2
    assert read_key(Path("anew")) != before


def run(*arguments: str):
    return CliRunner().invoke(cli.app, [*arguments], catch_exceptions=False)


def test_the_command_goes_on_with_a_run_and_shows_its_requests():
    given = ["data.forget=second.jsonl", "data.retain=with_first.jsonl", "train.output_dir=told"]
    assert run("train", "forget.yaml", *given, "--continue-from", "first").exit_code == 0
    resolved = Recipe.load("told/recipe.yaml")
    assert (resolved.model.path, resolved.model.continued) == ("first", True)
    shown = run("requests", "told").stdout.splitlines()
    assert len(shown) == 5 and "asked: 3 rows, ga+gd, forget; 3 retain rows left out" in shown[2]
    assert json.loads(run("requests", "told", "--json").stdout) == read_ledger(Path("told"))
    with pytest.raises(UserError, match="--continue-from: there is no folder nowhere"):
        run("train", "forget.yaml", "--continue-from", "nowhere")


def test_an_adapter_is_trained_further():
    given = ["data.forget=first.jsonl", "model.lora={r: 2}", "train.output_dir=adapter"]
    assert run("train", "forget.yaml", *given).exit_code == 0
    again = ["data.forget=second.jsonl", "model.lora={r: 2}", "train.output_dir=adapter_again"]
    assert run("train", "forget.yaml", *again, "--continue-from", "adapter").exit_code == 0
    first, second = (
        load_file(f"{name}/adapter_model.safetensors") for name in ("adapter", "adapter_again")
    )
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert json.loads(Path("adapter_again/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ].endswith("target")
    assert len(check_chain(Path("adapter_again"))) == 4


@pytest.mark.slow
def test_two_processes_do_and_record_what_one_does(work):
    given = ["data.forget=third.jsonl", "data.retain=with_both.jsonl", "train.output_dir=two"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "unlearn_llm", "train", "forget.yaml", *given, "--continue-from", "second"]
    done = subprocess.run(
        [sys.executable, *launch, *command, "train.per_device_train_batch_size=1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("6 retain rows are left out") == 1
    ours, theirs = check_chain(Path("two")), check_chain(Path("third"))
    assert [entry.get("rows") for entry in ours] == [entry.get("rows") for entry in theirs]
    assert ours[4]["retain_rows_left_out"] == 6
    one, two = (load_file(f"{name}/model.safetensors") for name in ("third", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-6, rtol=0)
