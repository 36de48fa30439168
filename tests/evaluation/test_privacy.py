"""The privacy suite from end to end: a model that learnt the forget set by heart, and a gold."""

import json
import shutil

import numpy as np
import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model

from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import evaluate, recompute
from unlearn_llm.evaluation.roc_figure import draw_roc
from unlearn_llm.evaluation.samples import samples_of
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.scoring import score

# Six of 40 authors; two rows would be too few for any interval.
SUITE = {"authors": "synthetic", "split": "forget15", "intervals": {"resamples": 100}}


@pytest.fixture(scope="module")
def suite():
    return Suite.load("privacy", **SUITE)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(small_tokenizer(), max_length=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("privacy")


@pytest.fixture(scope="module")
def gold(suite, encoder, folder):
    return evaluate(suite, tiny_model(), encoder, folder / "gold")


@pytest.fixture(scope="module")
def member(suite, encoder, folder, gold):
    model = by_heart(tiny_model(), encoder, samples_of(suite, "forget").samples)
    return evaluate(suite, model, encoder, folder / "own", reference_records=folder / "gold")


def by_heart(model, encoder, samples, steps=60):
    pairs = encoder.pairs([s.question for s in samples], [s.answer for s in samples])
    rows = Collator(0).sequences(list(enumerate(pairs)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        scored = score(model, {"answer": rows})["answer"]
        (-scored.logp.sum() / scored.length.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_probes_are_the_forget_authors_and_the_next_ones_in_line(suite):
    forget, holdout = (samples_of(suite, name).samples for name in ("forget", "holdout"))
    assert len(forget) == len(holdout) == 60
    assert [len({s.group for s in side}) for side in (forget, holdout)] == [6, 6]
    assert not {s.group for s in forget} & {s.group for s in holdout}


def test_a_model_that_was_trained_on_the_rows_is_found_out(member):
    for name in ("mia_loss", "mia_min_k", "mia_reference"):
        score = member.scores[name]
        assert score.value > 0.9, name
        assert score.interval.low > 0.6, name  # six authors prove no more
    assert member.scores["privleak"].value < -80
    assert "reference AUC" in member.scores["privleak"].note
    assert member.scores["tpr/mia_loss"].value > 0.8


def test_a_model_that_never_saw_them_is_not(gold):
    for name in ("mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm"):
        interval = gold.scores[name].interval
        assert interval.low < 0.5 < interval.high, name


def test_without_a_gold_model_privleak_is_not_measured(gold):
    for name in ("privleak", "mia_reference"):
        assert gold.scores[name].value is None
        assert "reference records" in gold.scores[name].note


def test_against_one_half_only_if_asked_for(suite, folder, gold):
    asked = suite.scores["privleak"].model_copy(update={"options": {"reference_auc": 0.5}})
    other = suite.model_copy(update={"scores": {"privleak": asked}})
    auc = gold.scores["mia_min_k"].value
    found = recompute(folder / "gold", other)["privleak"]
    assert found.value == pytest.approx(100 * (0.5 - auc) / 0.5)
    assert found.note == "reference AUC 0.5"


def test_curves_enclose_the_areas(folder, member):
    curves = json.loads((folder / "own" / "roc.json").read_text(encoding="utf-8"))
    assert set(curves) == {name for name in member.scores if name.startswith("mia")}
    for name, curve in curves.items():
        area = np.trapezoid(curve["tpr"], curve["fpr"])
        assert area == pytest.approx(member.scores[name].value), name


def test_curves_of_two_models_are_drawn_a_panel_an_attack(tmp_path, folder, member, gold):
    picture = tmp_path / "roc.svg"
    draw_roc(picture, [folder / "own", folder / "gold"])
    text = picture.read_text(encoding="utf-8")
    for name in member.scores:
        if name.startswith("mia"):
            assert text.count(f">{name}<") == 1
            assert f">own: {member.scores[name].value:.3f}<" in text
    # The gold model has no reference of its own, so it misses in one of six panels.
    assert text.count(">gold: ") == 5 and text.count(">own: ") == 6


def test_a_folder_without_whole_curves_is_refused(tmp_path, folder, member):
    picture, damaged = tmp_path / "roc.svg", tmp_path / "damaged"
    with pytest.raises(UserError, match=r"holds no roc\.json"):
        draw_roc(picture, [tmp_path])
    shutil.copytree(folder / "own", damaged)
    for content, said in (('{"mia_loss": {"fpr": [0, 1]}}', "is damaged"), ("{}", "no attack")):
        (damaged / "roc.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            draw_roc(picture, [folder / "own", damaged])
    assert not picture.exists()


def test_records_hold_what_the_attacks_read_and_are_enough(suite, folder, member):
    record = member.records[0]
    assert record["results"]["gradient"]["norm"] == record["metrics"]["mia_gradnorm"]
    moments = record["results"]["moments"]
    assert len(moments["means"]) == record["results"]["answer"]["tokens"]
    assert member.details["requests"] == {"scored": 120, "moments": 120, "gradients": 120}
    again = recompute(folder / "own", suite, reference_records=folder / "gold")
    assert again == member.scores


def test_tofu_rows_are_grouped_by_twenty(shared):
    suite = Suite.load("tofu", folder=str(shared / "data" / "tofu" / "official"), limit=45)
    groups = [sample.group for sample in samples_of(suite, "forget").samples]
    assert groups == ["0"] * 20 + ["1"] * 20 + ["2"] * 5
    assert {sample.group for sample in samples_of(suite, "world_facts").samples} == {None}
    ordered = suite.model_copy(update={"row_order": "closer_look"})
    last_first = [sample.group for sample in samples_of(ordered, "forget").samples]
    assert last_first == ["18"] * 20 + ["19"] * 20 + ["10"] * 5


def test_sources_follow_split_and_authors():
    suite = Suite.load("privacy", split="forget05")
    assert [suite.source_of(probe) for probe in suite.probes] == [
        "tofu/forget05_perturbed",
        "tofu/holdout05",
    ]
