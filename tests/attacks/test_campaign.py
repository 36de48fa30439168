import json
from pathlib import Path

import pytest
from models_for_tests import small_tokenizer, tiny_model
from typer.testing import CliRunner

from unlearn_llm import synthetic
from unlearn_llm.attacking import Request, attack_models
from unlearn_llm.attacks.base import ATTACKS, Fact, Material, NotMeasured, Subject, Trial
from unlearn_llm.attacks.campaign import ANY, Findings, judge, run_attacks
from unlearn_llm.attacks.verdict import LEAKS, LIKE_GOLD, SUPPRESSED
from unlearn_llm.cli import app
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError

QUICK = ["plain", "probability", "translation"]
MATERIAL = Material(tuple(Fact(str(n), f"Who is {n}?", f"Number {n} is Ann.") for n in range(4)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small models in folders, and a file with rows to forget."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("model", 0), ("gold", 1)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)
    rows = synthetic.generate("forget10", authors=20, questions_per_author=2)
    secret = [{**row, "answer": f"Zebra {n} {row['answer']}"} for n, row in enumerate(rows)]
    (folder / "forget.jsonl").write_text("\n".join(map(json.dumps, secret)), encoding="utf-8")
    return folder


def request(folders, output, **changes):
    settings = {
        "models": [str(folders / "model")],
        "gold": str(folders / "gold"),
        "forget": str(folders / "forget.jsonl"),
        "attacks": QUICK,
        "overrides": ["data.template=plain"],
        "output": output,
        "max_new_tokens": 4,
    }
    return Request(**{**settings, **changes})


def trials(**values) -> Findings:
    return Findings({name: [Trial(name, rows)] for name, rows in values.items()})


ROWS = {str(n): 0.1 * (n % 5) for n in range(40)}


def test_an_adapter_is_compared_with_gold_as_it_answers_plainly():
    ours = trials(plain=ROWS, adapter_off=dict.fromkeys(ROWS, 1.0))
    theirs = trials(plain=ROWS)
    theirs.not_applicable["adapter_off"] = "the model has no adapter"
    found = judge(ours, theirs, Material(()))
    assert found.verdict.level == LEAKS
    (one,) = [c for c in found.comparisons if c.trial == "adapter_off"]
    assert (one.model.leaked, one.gold.leaked) == (40, 0)


def test_the_most_of_all_attacks_is_compared_on_the_attacks_both_have():
    ours = trials(plain=ROWS, prefix={row: 0.9 for row in ROWS})
    found = judge(ours, trials(plain=ROWS), Material(()))
    (most,) = [c for c in found.comparisons if c.trial == ANY]
    assert most.excess == 0.0


def test_without_every_attack_a_model_like_gold_is_only_suppressed():
    found = judge(trials(plain=ROWS), trials(plain=ROWS), Material(()))
    assert found.verdict.level == SUPPRESSED
    assert found.verdict.not_run.keys() == set(ATTACKS) - {"plain"}
    everything = {name: ROWS for name in ATTACKS}
    assert (
        judge(trials(**everything), trials(**everything), Material(())).verdict.level == LIKE_GOLD
    )


def test_a_campaign_that_was_interrupted_goes_on_where_it_was(tmp_path, monkeypatch):
    asked = []

    def counting(name):
        def attack(subject, material):
            asked.append(name)
            if name == "second" and len(asked) == 2:
                raise KeyboardInterrupt
            if name == "third":
                raise NotMeasured("no rows")
            return [Trial(name, {"0": 0.25}, details={"k": 1})]

        return attack

    for name in ("first", "second", "third"):
        monkeypatch.setitem(ATTACKS._entries, name, counting(name))
    one = Subject.of(tiny_model(), Encoder(small_tokenizer(), "plain", 64))
    chosen = {"first": {}, "second": {}, "third": {}}
    whole = run_attacks(one, MATERIAL, {"first": {}, "third": {}})
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run_attacks(one, MATERIAL, chosen, tmp_path / "journal.json")
    found = run_attacks(one, MATERIAL, chosen, tmp_path / "journal.json")
    assert asked == ["first", "second", "second", "third"]
    assert found.trials["first"] == whole.trials["first"]
    assert found.not_measured == {"third": "no rows"}
    # Another model, or other rows, have nothing to do with what is in the journal.
    other = Subject.of(tiny_model(seed=1), Encoder(small_tokenizer(), "plain", 64))
    run_attacks(other, MATERIAL, {"first": {}}, tmp_path / "journal.json")
    run_attacks(other, Material(MATERIAL.forget[:1]), {"first": {}}, tmp_path / "journal.json")
    assert asked[4:] == ["first", "first"]


def test_models_are_attacked_beside_gold_and_no_text_is_written(folders, tmp_path):
    found = attack_models(request(folders, tmp_path))
    details = found[str(folders / "model")]
    assert details["verdict"]["level"] == SUPPRESSED
    assert "no column translated_question" in details["verdict"]["not_run"]["translation"]
    assert details["verdict"]["not_run"]["prefix"] == "not chosen"
    assert details["rows"]["model"]["plain"].keys() == {"0", "1", "2", "3"}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"attacks.json", "journal.json"}
    assert not any("Zebra" in file.read_text(encoding="utf-8") for file in files)
    # The second time everything is on disk.
    (written,) = tmp_path.rglob("attacks.json")
    before = written.read_text(encoding="utf-8")
    attack_models(request(folders, tmp_path))
    assert written.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget": None}, "does not say what it forgot"),
        ({"attacks": ["prefx"]}, "Did you mean 'prefix'"),
        ({"overrides": ["sampling.samples=2"]}, "sampling: no attack that runs"),
        ({"overrides": ["rules.margn=2"]}, "margn"),
        ({"models": ["/nowhere/at/all"]}, "no folder"),
    ],
)
def test_mistakes_are_told_before_weights_are_loaded(folders, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        attack_models(request(folders, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_the_command_shows_attacks_and_verdict(folders, tmp_path):
    words = ["attack", str(folders / "model"), "data.template=plain", "--attacks", "plain"]
    words += ["--forget", str(folders / "forget.jsonl"), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert f"model: {SUPPRESSED}" in done.output
    assert "no gold model for plain" in done.output
    as_json = CliRunner().invoke(app, [*words, "--max-new-tokens", "4", "--json"])
    (details,) = json.loads(as_json.stdout).values()
    assert details["rows"]["gold"] is None
    assert Path(tmp_path).is_dir()
