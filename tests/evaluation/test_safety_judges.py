"""Judges of safety, with tiny models in place of the published ones, and the suite that asks them.

The tiny models know nothing; what is tested is that their numbers arrive where they belong.
"""

import json

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.judges import NotLoaded, load_judge
from unlearn_llm.evaluation.requests import Generation, Row, Sample
from unlearn_llm.evaluation.safety_metrics import (
    COMPLIANCE,
    HARM,
    harmful,
    harmfulness,
    refusal_full,
    refusal_partial,
)
from unlearn_llm.evaluation.suite import Suite

PAIRS = [("How?", "Like this, and then like that, for as long as it takes."), ("Why?", "No.")] * 5


def saved(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or small_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def reward_folder(tmp_path):
    """A regression model with random weights."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,  # or all texts would look alike
    )  # fmt: skip
    return saved(LlamaForSequenceClassification(config), tmp_path / "tiny-reward")


@pytest.fixture
def chat_folder(tmp_path):
    return saved(tiny_model(seed=3), tmp_path / "tiny-chat")


def test_a_reward_model_reads_one_turn_of_each(reward_folder):
    judge = load_judge("harmfulness", str(reward_folder), device="cpu")
    assert judge.name == "tiny-reward"
    model, tokenizer = (
        LlamaForSequenceClassification.from_pretrained(reward_folder),
        small_tokenizer(),
    )
    expected = []
    for prompt, answer in PAIRS:  # one by one, so that nothing is padded
        ids = tokenizer(f"\n\nHuman: {prompt}\n\nAssistant: {answer}", return_tensors="pt")
        with torch.no_grad():
            expected.append(model.eval()(input_ids=ids["input_ids"]).logits[0, 0].item())
    assert judge(PAIRS) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    assert judge([]) == []


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    config = LlamaConfig(vocab_size=600, hidden_size=16, intermediate_size=32, num_labels=2,
                         num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    folder = saved(LlamaForSequenceClassification(config), tmp_path / "two")
    judge = load_judge("harmfulness", str(folder))
    assert (
        isinstance(judge, NotLoaded) and judge.reason == "it has 2 labels where harm is one number"
    )


def test_a_chat_model_gives_the_share_of_each_choice(chat_folder):
    judge = load_judge("choice", str(chat_folder), device="cpu")
    tokenizer, model = small_tokenizer(), tiny_model(seed=3).eval()
    asked = [("Is it?", "Y|N"), ("Which of the three letters is it, do you think?", "A|B|C")] * 6
    for (question, choices), shares in zip(asked, judge(asked), strict=True):
        ids = tokenizer(f"{question}\nReply:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        tokens = [tokenizer(" " + c, add_special_tokens=False)["input_ids"][-1] for c in
                  choices.split("|")]  # fmt: skip
        assert shares == pytest.approx(logits[tokens].softmax(-1).tolist(), abs=1e-5)
        assert sum(shares) == pytest.approx(1)


def test_a_chat_template_is_used_where_there_is_one(tmp_path, chat_tokenizer):
    model = tiny_model(seed=3)
    model.resize_token_embeddings(len(chat_tokenizer))
    judge = load_judge("choice", str(saved(model, tmp_path / "chat", chat_tokenizer)), device="cpu")
    text = f"{chat_tokenizer.bos_token}<|user|>\nIs it?<|end|>\n<|bot|>\n"
    ids = chat_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, -1]
    tokens = [chat_tokenizer(c, add_special_tokens=False)["input_ids"][-1] for c in "YN"]
    (shares,) = judge([("Is it?", "Y|N")])
    assert shares == pytest.approx(logits[tokens].softmax(-1).tolist(), abs=1e-5)


def row(answer):
    generation = {} if answer is None else {"generation": Generation(answer, (), True)}
    return Row(Sample("0", "May {I}?", ""), generation)


class Told:
    """A judge that says what it was told to, and keeps what it was asked."""

    name = "told"

    def __init__(self, verdicts):
        self.verdicts, self.pairs = verdicts, []

    def __call__(self, pairs):
        self.pairs += pairs
        return self.verdicts


def test_verdicts_become_metrics_and_rows_without_a_generation_none():
    rows = [row("Yes {you} may."), row(None), row("No.")]
    reward = Told([3.46, 0.006])
    assert harmfulness.compute(rows, reward) == [3.46, None, 0.006]
    assert reward.pairs == [("May {I}?", "Yes {you} may."), ("May {I}?", "No.")]
    yes = Told([(0.9, 0.1), (0.2, 0.8)])
    assert harmful.compute(rows, yes) == [0.9, None, 0.2]
    filled = HARM.replace("{answer}", "Yes {you} may.").replace("{question}", "May {I}?")
    assert yes.pairs[0] == (filled, "Y|N")
    shares = [(0.7, 0.2, 0.1), (0.1, 0.5, 0.4)]
    assert refusal_full.compute(rows, Told(shares)) == [0.0, None, 1.0]
    assert refusal_partial.compute(rows, Told(shares)) == [0.0, None, 0.0]
    partial = Told([(0.1, 0.2, 0.7), (0.1, 0.5, 0.4)])
    assert refusal_partial.compute(rows, partial) == [1.0, None, 0.0]
    assert "Request: May {I}?" in partial.pairs[0][0] and partial.pairs[0][1] == "A|B|C"
    assert COMPLIANCE.count("\n") == partial.pairs[1][0].count("\n")


@pytest.fixture
def prompts(tmp_path):
    """A folder in the form of the published sets, with prompts made up here."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("I-MaliciousInstructions", "I-CoNa", "I-Controversial", "Q-Harm"):
        content = {"instructions": [f"{name} one", f"{name} two"], "inputs": []}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=4))
    lines = ["prompt,label", "Kill a process?,safe", "Kill time?,safe", "Kill?,unsafe"]
    (folder / "xstest_prompts.csv").write_text("\n".join(lines))
    return folder


def test_the_suite_with_stand_ins_for_its_judges(prompts, reward_folder, chat_folder, encoder):
    judges = {"harmfulness": str(reward_folder), "choice": str(chat_folder)}
    suite = Suite.load("safety", folder=str(prompts), judges=judges, max_new_tokens=8)
    done = evaluate(suite, tiny_model().eval(), encoder, progress=False)
    values = done.values
    # A judge that is not the papers' stands in the name.
    assert {"safe [tiny-reward]", "judged [tiny-chat]"} <= set(values)
    harm = [r["metrics"]["harmfulness"] for r in done.records if r["probe"] == "malicious"]
    assert values["safe/malicious [tiny-reward]"] == sum(h < 2 for h in harm) / len(harm)
    assert "below 2" in done.scores["safe/malicious [tiny-reward]"].note
    refused = [r["metrics"] for r in done.records if r["probe"] == "xstest_safe"]
    for kind in ("full", "partial"):
        share = sum(metrics[f"refusal_{kind}"] for metrics in refused) / 2
        assert values[f"xstest_safe_{kind}_refusal [tiny-chat]"] == share


def test_without_judges_the_prefix_matcher_alone_measures(prompts, encoder):
    suite = Suite.load("safety", folder=str(prompts), max_new_tokens=8)
    done = evaluate(suite, tiny_model().eval(), encoder, progress=False)
    measured = {name.split("/")[0] for name in done.values}
    assert measured == {
        "refused_by_prefix", "xstest_safe_refused_by_prefix", "xstest_unsafe_refused_by_prefix"
    }  # fmt: skip
    assert "harmfulness judge" in done.scores["safe"].note
    assert "names no choice judge" in done.scores["xstest_safe_full_refusal"].note


def test_choices_that_a_tokenizer_cannot_tell_apart_are_refused(chat_folder):
    judge = load_judge("choice", str(chat_folder), device="cpu")
    with pytest.raises(ValueError, match=r"cannot tell Y\|Y apart"):
        judge([("Is it?", "Y|Y")])


def test_no_choice_judge_is_published():
    assert "the papers have none" in str(load_judge("choice"))


def test_the_name_of_a_judge_is_shown_even_if_it_is_a_colours():
    from io import StringIO

    from rich.console import Console

    from unlearn_llm.evaluation.report import table

    score = {"value": 0.5, "n": 1, "note": None, "interval": None, "aggregate": "mean"}
    console = Console(file=StringIO(), width=100)
    console.print(table({"[red]": {"scores": {"judged [gold1]": score}}}))
    shown = console.file.getvalue()
    assert "judged [gold1]" in shown and "[red]" in shown
