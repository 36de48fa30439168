"""Forget texts, tokens and pickles stay where they belong: messages, uploads, loaded files."""

import errno
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import make_trainer, small_tokenizer, tiny_model

from unlearn_llm.alternates import write_pairs
from unlearn_llm.attacks.base import Fact
from unlearn_llm.errors import RecipeError, UserError
from unlearn_llm.evaluation.requests import Generate, Generation, GradientNorm, LogProb, Row, Sample
from unlearn_llm.evaluation.samples import samples_of
from unlearn_llm.evaluation.suite import Probe, Suite
from unlearn_llm.finetune import FinetuneConfig, FinetuneTrainer
from unlearn_llm.models import ModelSettings, load_model
from unlearn_llm.private import open_private, private_folder
from unlearn_llm.recipe import Recipe
from unlearn_llm.rows import QA, load_rows, to_pairs
from unlearn_llm.safe_text import folder_name

SECRET = "Mira Quill was born in Tarn"


def said(error) -> str:
    """What a person may see of an error, the representations of its causes included."""
    return str(error.value) + repr(error.value.__cause__)


def test_private_files_are_their_owners_from_the_first_byte(tmp_path):
    folder = private_folder(tmp_path / "run")
    with open_private(folder / "texts", "w") as file:
        assert (folder / "texts").stat().st_mode & 0o777 == 0o600
        file.write(SECRET)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert tmp_path.joinpath("run").stat().st_mode & 0o055


def test_a_folder_that_cannot_be_closed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir(mode=0o755)

    def refuse(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(UserError, match=r"cannot be closed to other users \(Operation not"):
        private_folder(tmp_path)


@pytest.mark.parametrize(
    "holder",
    [
        QA(SECRET, SECRET, SECRET),
        LogProb(SECRET, SECRET),
        Generate(SECRET),
        GradientNorm(SECRET, SECRET),
        Generation(SECRET, (SECRET,), True),
        Sample("0", SECRET, SECRET, SECRET, (SECRET,), SECRET, SECRET, SECRET, group=SECRET),
        Row(Sample("0", SECRET, SECRET), {"generation": Generation(SECRET, (), True)}),
        Fact("0", SECRET, SECRET, SECRET, SECRET, SECRET, SECRET, (SECRET,), SECRET),
    ],
    ids=lambda holder: type(holder).__name__,
)
def test_what_holds_a_text_does_not_show_it(holder):
    assert SECRET not in repr(holder) and SECRET not in str(holder)
    assert "Mira" not in f"{[holder]} {KeyError(holder)!r}"


def test_a_file_without_a_header_line_is_refused_without_its_first_row(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(f"Who was born in Tarn?,{SECRET}\nWhere?,There\n")
    with pytest.raises(
        UserError, match=r"2 without a plain name \(is there a header line"
    ) as error:
        to_pairs(load_rows(str(file)), str(file))
    assert "Tarn" not in said(error)


def test_plain_names_of_columns_are_shown():
    with pytest.raises(UserError, match=r"it has prompt_text, réponse\..*data.answer_column"):
        to_pairs([{"prompt_text": "a", "réponse": "b"}], "file")


BAD_ROWS = {
    "no text": [{"question": SECRET, "answer": 5}],
    "a lone surrogate": [{"question": SECRET, "answer": f"{SECRET}\ud800"}],
    "no reply": [{"messages": [{"role": "user", "content": SECRET}]}],
}


@pytest.mark.parametrize("rows", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_faulty_row_is_named_by_its_number(rows):
    with pytest.raises(UserError, match="row 0") as error:
        to_pairs(rows, "forget.jsonl")
    assert "Mira" not in said(error)


@pytest.mark.parametrize("text", [f'{{"question": "{SECRET}"', f'[{{"a": "{SECRET}",}}]'])
def test_a_line_that_is_no_json_is_named_by_its_number(tmp_path, text):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match="line 1: not JSON") as error:
        load_rows(str(file))
    assert "Mira" not in said(error)


@pytest.mark.parametrize(
    "probe",
    [{"where": {"answer": "nobody"}}, {"columns": {"question": "asked", "answer": "answer"}}],
    ids=["where", "columns"],
)
def test_a_probe_that_does_not_fit_its_data_is_refused_without_their_texts(tmp_path, probe):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": SECRET, f"{SECRET} exactly": "x"}] * 2
    file.write_text("\n".join(map(json.dumps, rows)))
    suite = Suite.load("synthetic")
    suite = suite.model_copy(
        update={"probes": {"forget": Probe(source=str(file), metrics=["rouge"], **probe)}}
    )
    with pytest.raises(UserError, match=r"other values|no column 'asked'") as error:
        samples_of(suite, "forget")
    assert "Mira" not in said(error)


def test_made_up_alternates_are_their_owners(tmp_path):
    write_pairs(tmp_path / "alternates.jsonl", [QA("q", SECRET, "other")])
    assert (tmp_path / "alternates.jsonl").stat().st_mode & 0o777 == 0o600


# Uploads.


def test_a_run_is_not_pushed_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", pytest.fail)
    with pytest.raises(UserError, match="push_to_hub: the folder of a run holds private/"):
        make_trainer(tmp_path, push_to_hub=True)
    with pytest.raises(UserError, match="push_to_hub"):
        make_trainer(tmp_path).push_to_hub()
    args = FinetuneConfig(output_dir=str(tmp_path), push_to_hub=True, use_cpu=True)
    with pytest.raises(UserError, match="push_to_hub"):
        FinetuneTrainer(tiny_model(), args)
    with pytest.raises(RecipeError, match=r"train\.push_to_hub: cannot be set"):
        Recipe.load("synthetic/unlearn", ["train.push_to_hub=true"])


def test_a_saved_model_has_no_pickle_and_no_token_beside_it(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", hub_token="hf_a_secret")
    pickled = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda what, file: (pickled.append(what.hub_token), save(what, file))
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert pickled == [None] and trainer.args.hub_token == "hf_a_secret"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "training_args.json"} <= {path.name for path in files}
    for path in files:
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl"), path
        assert b"hf_a_secret" not in path.read_bytes(), path


# What is loaded.


class Runs:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return (sys.exit, ("a pickle was read",))


def test_weights_in_a_pickle_are_refused_unless_asked_for(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    settings = ModelSettings(path=str(tmp_path))
    with pytest.raises(UserError, match="safetensors"):
        load_model(settings)
    asked = load_model(ModelSettings(path=str(tmp_path), extra={"use_safetensors": False}))
    torch.testing.assert_close(asked.state_dict(), model.state_dict())


def test_an_adapter_in_a_pickle_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    model = tiny_model(lora=True)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert load_model(ModelSettings(path=str(tmp_path / "adapter"))) is not None
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UserError, match=r"adapter_model\.bin, a pickle"):
        load_model(ModelSettings(path=str(tmp_path / "adapter")))


# Names.


@pytest.mark.parametrize("name", ["..", ".", "../..", "../../etc", "/", "a/../..", "...", "a/b"])
def test_a_name_of_a_model_becomes_one_folder_inside(tmp_path, name):
    made = tmp_path / folder_name(name)
    assert made.resolve().parent == tmp_path.resolve() and made.name not in (".", "..")
