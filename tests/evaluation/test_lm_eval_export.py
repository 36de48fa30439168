"""A suite written as tasks of lm-eval: the harness alone finds what we find."""

import importlib.util

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import evaluate
from unlearn_llm.evaluation.lm_eval_export import export_tasks
from unlearn_llm.evaluation.suite import Suite

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval"
)
TEMPLATES = ["plain", "llama2", "llama3", "phi", "phi_dualoptim", "chat"]


def suite_of(**overrides):
    return Suite.load("synthetic", limit=4, max_new_tokens=16, intervals=None, **overrides)


def by_harness(folder, model, tokenizer):
    """The samples of every task of a folder, as lm-eval's own loop makes them."""
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(folder))
    loaded = manager.load(["synthetic"])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    return run(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)


@needs_lm_eval
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_harness_alone_finds_what_we_find(template, tmp_path, chat_tokenizer):
    tokenizer = chat_tokenizer if template == "chat" else small_tokenizer()
    model = tiny_model(seed=2).eval()
    if template == "chat":
        model.resize_token_embeddings(len(tokenizer))
    encoder, suite = Encoder(tokenizer, template), suite_of()
    names = export_tasks(suite, encoder, tmp_path / "tasks")
    assert names == [
        f"synthetic_{probe}_{kind}" for probe in suite.probes for kind in
        ("likelihood", "generation")
    ]  # fmt: skip
    ours = evaluate(suite, model, encoder, progress=False)
    theirs = by_harness(tmp_path / "tasks", model, tokenizer)

    for probe in suite.probes:
        records = [record for record in ours.records if record["probe"] == probe]
        likelihood = theirs["samples"][f"synthetic_{probe}_likelihood"]
        for record, sample in zip(records, likelihood, strict=True):
            prompt = encoder.prompt_text(record["question"])
            # lm-eval takes a prompt without its last blanks, which stand before the answer.
            assert all((first + rest).startswith(prompt) for first, rest in sample["arguments"])
            whole = "".join(sample["arguments"][0])
            assert whole.startswith(encoder.full_text(record["question"], record["answer"]))
            told = record["metrics"]
            probability = torch.tensor(record["results"]["answer"]["token_logps"]).mean().exp()
            assert sample["probability"] == pytest.approx(probability.item(), rel=1e-4)
            assert sample["truth_ratio_forget"] == pytest.approx(
                min(told["truth_ratio"], 1 / told["truth_ratio"]), rel=1e-4
            )
            if "probability_normalised" in told:
                given = told["probability_normalised"]
                assert sample["probability_normalised"] == pytest.approx(given, rel=1e-4)
        generation = theirs["samples"][f"synthetic_{probe}_generation"]
        for record, sample in zip(records, generation, strict=True):
            prompt = encoder.prompt_text(record["question"]).rstrip(" ")
            assert sample["arguments"][0][0] == prompt
            assert sample["resps"][0][0].strip() == record["generation"]["text"]
            assert sample["rougeL_recall"] == pytest.approx(record["metrics"]["rouge"])

    stated = theirs["results"]["synthetic_retain_likelihood"]
    assert stated["truth_ratio_nonforget,none"] == pytest.approx(
        ours.values["retain/truth_ratio"], abs=1e-4
    )
    assert stated["probability,none"] == pytest.approx(ours.values["retain/probability"], rel=1e-4)


def test_a_folder_with_files_is_left_alone(tmp_path, encoder):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_tasks(suite_of(), encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_tokens_than_ours_are_refused(tmp_path, monkeypatch, encoder):
    from unlearn_llm.evaluation import lm_eval_export

    real = lm_eval_export._as_lm_eval
    # As a tokenizer that writes a BOS which the template has already.
    monkeypatch.setattr(lm_eval_export, "_as_lm_eval", lambda e, text: [1, *real(e, text)])
    with pytest.raises(UserError, match=r"other tokens than this package in probe 'forget', rows"):
        export_tasks(suite_of(), encoder, tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_a_suite_without_such_metrics_is_refused(tmp_path, encoder):
    with pytest.raises(UserError, match="downstream has no metric that lm-eval can take"):
        export_tasks(Suite.load("downstream"), encoder, tmp_path / "tasks")
