"""Writes a suite as tasks of lm-eval, so that the harness alone can score it.

The prompts are ours to the byte, and so are the tokens that count as answer: a row of which
lm-eval would read other tokens is refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from unlearn_llm.encode import Encoder, row_list
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.records import write_json_lines, write_whole
from unlearn_llm.evaluation.requests import Sample
from unlearn_llm.evaluation.samples import samples_of
from unlearn_llm.evaluation.suite import Suite
from unlearn_llm.private import FOLDER_OF_OWNER
from unlearn_llm.resources import EVAL

FUNCTIONS = EVAL / "lm_eval" / "unlearn_tasks.py"
LIKELIHOOD = ("probability", "probability_normalised", "truth_ratio")
COMPARED = ("probability_normalised", "truth_ratio_forget", "truth_ratio_nonforget")


def export_tasks(suite: Suite, encoder: Encoder, folder: Path) -> list[str]:
    """Write the probes of a suite as tasks, and a group of all of them.

    Each probe becomes NAME_PROBE_likelihood (probability of the answers, truth ratio) and
    NAME_PROBE_generation (ROUGE-L recall), as far as the suite takes such metrics there. They are
    for models with this tokenizer and this template.

    Returns:
        The names of the tasks.

    Raises:
        UserError: the folder is not empty, or lm-eval would read other tokens than we do.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"export-tasks: {folder} is not empty; give a new folder.")
    made: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = []
    for name, probe in suite.own_probes.items():
        samples = [s for s in samples_of(suite, name).samples if s.answer.strip()]
        if samples and set(LIKELIHOOD) & set(probe.metrics):
            rows = _likelihood_rows(encoder, samples, name)
            made.append((f"{suite.name}_{name}_likelihood", _likelihood_task(samples), rows))
        if samples and "rouge" in probe.metrics:
            task = _generation_task(suite.max_new_tokens)
            rows = [
                {"id": s.id, "prompt": encoder.prompt_text(s.question).rstrip(" "),
                 "answer": s.answer}
                for s in samples
            ]  # fmt: skip
            made.append((f"{suite.name}_{name}_generation", task, rows))
    if not made:
        raise UserError(f"export-tasks: suite {suite.name} has no metric that lm-eval can take.")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(FOLDER_OF_OWNER)  # it will hold the rows
    write_whole(folder / FUNCTIONS.name, FUNCTIONS.read_text(encoding="utf-8"), private=True)
    for name, task, rows in made:
        write_json_lines(folder / f"{name}.jsonl", rows, private=True)
        made_of = {"task": name, **_rows_of(name), **task}
        write_whole(folder / f"{name}.yaml", _yaml(made_of), private=True)
    group = {"group": suite.name, "task": [name for name, _, _ in made]}
    write_whole(folder / f"{suite.name}.yaml", _yaml(group), private=True)
    return [name for name, _, _ in made]


def _rows_of(name: str) -> dict[str, Any]:
    return {
        "custom_dataset": "!function unlearn_tasks.rows",
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def _likelihood_task(samples: Sequence[Sample]) -> dict[str, Any]:
    compared = COMPARED if all(sample.perturbed for sample in samples) else ()
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "process_results": "!function unlearn_tasks.likelihood",
        "metric_list": _means("probability", *compared),
    }


def _generation_task(max_new_tokens: int) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "process_results": "!function unlearn_tasks.generation",
        "metric_list": _means("rougeL_recall"),
    }


def _means(*metrics: str) -> list[dict[str, Any]]:
    return [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]


def _likelihood_rows(
    encoder: Encoder, samples: Sequence[Sample], probe: str
) -> list[dict[str, Any]]:
    rows, other = [], []
    for sample in samples:
        answers = [sample.answer, sample.paraphrased or sample.answer, *sample.perturbed]
        row = _likelihood_row(encoder, sample, answers)
        if row is None:
            other.append(int(sample.id))
        else:
            rows.append(row)
    if other:
        raise UserError(
            f"export-tasks: lm-eval would read other tokens than this package in probe {probe!r}, "
            f"{row_list(other)}. Another template may do (data.template=...)."
        )
    return rows


def _likelihood_row(
    encoder: Encoder, sample: Sample, answers: Sequence[str]
) -> dict[str, Any] | None:
    """Make a row; None if lm-eval would read other tokens."""
    prompt = encoder.prompt_text(sample.question)
    stripped = prompt.rstrip()  # lm-eval gives blanks to the answer, and so do we
    short, whole = len(_as_lm_eval(encoder, stripped)), len(_as_lm_eval(encoder, prompt))
    choices, tokens, without_lead = [], [], []
    for answer, encoded in zip(
        answers, encoder.pairs([sample.question] * len(answers), answers), strict=True
    ):
        text = encoder.full_text(sample.question, answer)
        if _as_lm_eval(encoder, text) != encoded.ids:  # our end token, written out
            text += str(encoder.tokenizer.eos_token)
        fits = text.startswith(prompt) and _as_lm_eval(encoder, text) == encoded.ids
        if not fits or encoded.n_prompt not in (short, whole):
            return None
        choices.append(text[len(stripped) :])
        tokens.append(len(encoded.ids) - encoded.n_prompt)
        without_lead.append(encoded.n_prompt != short)
    lead = any(without_lead)
    return {
        "id": sample.id,
        "prompt": stripped,
        "choices": [*choices, prompt[len(stripped) :]] if lead else choices,
        "tokens": tokens,
        "without_lead": without_lead,
        "lead": lead,
    }


def _as_lm_eval(encoder: Encoder, text: str) -> list[int]:
    """Tokenize as lm-eval does: with special tokens, unless the text has its own BOS."""
    bos = encoder.tokenizer.bos_token
    own = bool(bos) and text.startswith(str(bos))
    return list(encoder.tokenizer.encode(text, add_special_tokens=not own))


def _yaml(task: dict[str, Any]) -> str:
    text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    return re.sub(r"'(!function [\w.]+)'", r"\1", text)  # a tag, which safe_dump quotes
