"""lm-eval's tasks on a model in memory, offline, with rows made up here in the published forms."""

import importlib.util
import json
import random

import pytest
import torch
from models_for_tests import tiny_model

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import evaluate, recompute
from unlearn_llm.evaluation.lm_eval import load_tasks, require_lm_eval
from unlearn_llm.evaluation.suite import Suite

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval"
)
CHOICES = ["the sea", "a clock", "a very old and rather slow train", "no"]


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A folder per data set, laid out as the hub's."""
    for split, start in (("train", 0), ("test", 20)):
        rows = [
            {"question": f"What is {n} plus {n}?", "answer": f"It is <<{n}+{n}>>.\n#### {2 * n}"}
            for n in range(start, start + 7)
        ]
        save(tmp_path / "gsm8k" / f"{split}_7.jsonl", rows)
    arc = [
        {
            "question": f"What is thing number {n}?",
            "choices": {"text": CHOICES[n % 2 :], "label": ["A", "B", "C", "D"][: 4 - n % 2]},
            "answerKey": "ABC"[n % 3],
        }
        for n in range(9)
    ]
    save(tmp_path / "ai2_arc" / "ARC-Challenge" / "train.jsonl", arc[:1])
    save(tmp_path / "ai2_arc" / "ARC-Challenge" / "test-00000-of-00002.jsonl", arc[:5])
    save(tmp_path / "ai2_arc" / "ARC-Challenge" / "test-00001-of-00002.jsonl", arc[5:])
    return tmp_path


@pytest.fixture(scope="module")
def model():
    """Random weights large enough that the model prefers some answers to others."""
    made = tiny_model(seed=7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def logp(model, tokenizer, context, continuation):
    """Nats of a continuation, by the model's plain logits."""
    whole, start = tokenizer(context + continuation)["input_ids"], tokenizer(context)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    taken = logps.gather(1, torch.tensor(whole[1:])[:, None]).flatten()
    return taken[len(start) - 1 :].sum().item()


@needs_lm_eval
def test_accuracies_are_what_the_models_logits_say(folder, model, encoder, tokenizer, tmp_path):
    suite = Suite.load("downstream", folder=str(folder), tasks=["arc_challenge"])
    done = evaluate(suite, model, encoder, tmp_path / "out", progress=False)
    rows = [
        json.loads(line)
        for file in sorted((folder / "ai2_arc" / "ARC-Challenge").glob("test*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    model.eval()
    hits, normed = [], []
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        texts = row["choices"]["text"]
        logps = [logp(model, tokenizer, prompt, f" {text}") for text in texts]
        per_letter = [value / len(text) for value, text in zip(logps, texts, strict=True)]
        right = row["choices"]["label"].index(row["answerKey"])
        hits.append(float(logps.index(max(logps)) == right))
        normed.append(float(per_letter.index(max(per_letter)) == right))
    assert hits != normed  # or the two keys could be mixed up
    assert [r["metrics"]["acc,none"] for r in done.records] == hits
    assert [r["metrics"]["acc_norm,none"] for r in done.records] == normed
    assert done.scores["ARC-c"].value == pytest.approx(sum(normed) / len(normed))
    assert done.scores["ARC-c/acc"].value == pytest.approx(sum(hits) / len(hits))
    # What scores.json states of it, and the same scores from the records alone.
    entry = done.details["scores"]["ARC-c"]
    assert (entry["n"], entry["shots"], entry["metric"]) == (9, 0, "acc_norm,none")
    assert entry["stderr"] == pytest.approx(torch.tensor(normed).std().item() / 3, abs=1e-6)
    assert list(done.scores) == ["ARC-c", "ARC-c/acc"]
    again = recompute(tmp_path / "out", suite)
    assert {n: s.value for n, s in again.items()} == {n: s.value for n, s in done.scores.items()}


@needs_lm_eval
def test_gsm8k_has_five_shots_and_both_extracts(folder, model, encoder):
    suite = Suite.load("downstream", folder=str(folder), tasks=["gsm8k"], limit=4)
    state, mode = torch.get_rng_state(), model.train().training
    python_state = random.getstate()
    done = evaluate(suite, model, encoder, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert model.training is mode
    assert set(done.records[0]["metrics"]) == {
        "exact_match,strict-match", "exact_match,flexible-extract"
    }  # fmt: skip
    for number, record in enumerate(done.records):
        assert record["question"].count("####") == 5
        assert record["question"].endswith(f"Question: What is {20 + number} plus {20 + number}?"
                                           "\nAnswer:")  # fmt: skip
    score = done.scores["GSM8K"]
    assert score.n == 4 and score.note.startswith("exact_match,flexible-extract, 5 shots; stderr")
    # This model reads 256 tokens, so half of them are left to the prompt.
    assert "4 of 4 prompts cut at the model's context" in score.note
    assert done.details["tasks"]["gsm8k"]["version"] == 3.0


@needs_lm_eval
def test_a_task_of_ones_own_gets_all_its_metrics(folder, model, encoder, tmp_path):
    data = folder / "ai2_arc" / "ARC-Challenge" / "test-00000-of-00002.jsonl"
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "mine.yaml").write_text(
        "task: my_own\ndataset_path: mine\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: 0\ndoc_to_choice: "{{choices.text}}"\n'
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: mcc, higher_is_better: true}\n"
    )
    save(folder / "mine" / "test.jsonl", map(json.loads, data.read_text().splitlines()))
    suite = Suite.load("downstream", folder=str(folder), tasks=["my_own"], task_folders=[str(own)])
    done = evaluate(suite, model, encoder, progress=False)
    assert done.scores["my_own acc,none"].n == 5
    # MCC is no mean over rows, so there is no column; what lm-eval made of it is kept.
    assert "my_own mcc,none" not in done.scores
    about = done.details["tasks"]["my_own"]
    assert about["metrics"]["mcc,none"]["value"] is not None
    assert "no mean over rows" in done.details["not_measured"]["mcc,none"]
    # The suite is written down with what was found, so that the records give the scores again.
    assert done.details["suite"]["probes"]["my_own"]["metrics"] == ["acc,none"]


@needs_lm_eval
@pytest.mark.slow
def test_mmlu_is_weighted_by_size(folder, model, encoder):
    from pathlib import Path

    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    names = [
        line.split('"')[3]
        for file in sorted(tasks.glob("mmlu_*.yaml"))
        for line in file.read_text().splitlines()
        if line.startswith('"dataset_name"')
    ]
    assert len(names) == 57
    for index, name in enumerate(names):
        row = {"question": f"About {name}?", "choices": CHOICES, "answer": index % 4}
        save(folder / "mmlu" / name / "test.jsonl", [row] * (1 + index % 3))
        save(folder / "mmlu" / name / "dev.jsonl", [row])
    suite = Suite.load("wmdp", folder=str(folder), tasks=["mmlu"])
    done = evaluate(suite, model, encoder, progress=False)
    total = sum(1 + index % 3 for index in range(57))
    assert done.scores["MMLU"].n == total and len(done.records) == total
    stated = done.details["tasks"]["mmlu"]["metrics"]["acc,none"]["value"]
    assert done.scores["MMLU"].value == pytest.approx(stated)
    assert 0 < stated < 1
    # The mean of the 57 accuracies is another number.
    by_task = {}
    for record in done.records:
        by_task.setdefault(record["id"].split("/")[0], []).append(record["metrics"]["acc,none"])
    assert stated != pytest.approx(sum(sum(v) / len(v) for v in by_task.values()) / 57)


@needs_lm_eval
def test_missing_data_unknown_tasks_and_folders_are_one_line(folder, tmp_path):
    def complaint(**overrides):
        with pytest.raises(UserError) as error:
            load_tasks(Suite.load("downstream", **overrides), torch.nn.Linear(1, 1))
        assert "\n" not in str(error.value)
        return str(error.value)

    said = complaint(folder=str(folder), tasks=["triviaqa"])
    assert "'triviaqa'" in said and "trivia_qa/rc.nocontext" in said and "test.jsonl" in said
    (folder / "notes.jsonl").write_text("no JSON")  # is not looked into
    said = complaint(folder=str(folder), tasks=["triviaqa"])
    assert "has no data of mandarjoshi/trivia_qa" in said
    said = complaint(tasks=["arc_challenge"])  # offline
    assert "'arc_challenge' could not be loaded" in said and "folder=" in said
    (folder / "ai2_arc" / "ARC-Challenge" / "train.jsonl").unlink()
    said = complaint(folder=str(folder), tasks=["arc_challenge"])
    assert said == "The data of the task 'arc_challenge' have no split 'train', which it needs."
    assert "no folder" in complaint(tasks=["gsm8k"], task_folders=[str(tmp_path / "none")])


@needs_lm_eval
@pytest.mark.slow
def test_a_mistyped_task_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"knows no task 'gsm8'.*Did you mean 'gsm8k'"):
        load_tasks(Suite.load("downstream", tasks=["gsm8"]), torch.nn.Linear(1, 1))


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unlearn_llm\[lm-eval\]'"):
        require_lm_eval(Suite.load("downstream", tasks=["gsm8k"]))
    require_lm_eval(Suite.load("tofu"))  # has no such task


def test_the_keys_and_shots_of_the_papers():
    suite = Suite.load("downstream")
    found = {
        name: (suite.probes[score.options["probe"]].shots, score.options["metric"])
        for name, score in suite.scores.items()
        if "probe" in score.options
    }
    assert found == {
        "ARC-c": (0, "acc_norm,none"),
        "MMLU": (0, "acc,none"),
        "TruthfulQA": (0, "acc,none"),
        "TriviaQA": (0, "exact_match,remove_whitespace"),
        "GSM8K": (5, "exact_match,flexible-extract"),
        "ARC-c/acc": (0, "acc,none"),
        "GSM8K/strict": (5, "exact_match,strict-match"),
    }
    averaged = {(m["probe"], m["metric"]) for m in suite.scores["AVG"].options["members"]}
    main = [n for n in found if "/" not in n]
    assert averaged == {
        (suite.scores[n].options["probe"], suite.scores[n].options["metric"]) for n in main
    }


@needs_lm_eval
def test_a_served_model_is_refused_before_anything_is_asked():
    with pytest.raises(UserError, match=r"gsm8k are put to a model of transformers, not to a str"):
        load_tasks(Suite.load("downstream", tasks=["gsm8k"]), "served")
