"""The rows of an exported suite, and how lm-eval's answers become our metrics.

`unlearn export-tasks` puts a copy of this file beside the tasks. It needs lm-eval's own
dependencies only.
"""

import json
import math
from pathlib import Path

import datasets
from rouge_score.rouge_scorer import RougeScorer


def rows(file, **_):
    """Read the rows of a task, as lm-eval wants them: {"test": rows}."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.split("\n") if line]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(found)})


def likelihood(doc, results):
    """Make the metrics of the choices' log-probabilities.

    The choices are the answer, its paraphrase, the wrong answers; where `lead` is true there is
    one more, the blanks before an answer: lm-eval counts them as answer, and so they are taken off
    where our own count does not have them.
    """
    logps = [logp for logp, _ in results]
    lead = logps.pop() if doc["lead"] else 0.0
    losses = [
        -(logp - (lead if without else 0.0)) / tokens
        for logp, without, tokens in zip(logps, doc["without_lead"], doc["tokens"], strict=True)
    ]
    answer, paraphrased, *wrong = losses
    found = {"probability": math.exp(-answer)}
    if wrong:
        ratio = math.exp(min(max(paraphrased - sum(wrong) / len(wrong), -700.0), 700.0))
        others = sum(math.exp(min(answer - loss, 700.0)) for loss in wrong)
        found["probability_normalised"] = 1 / (1 + others)
        found["truth_ratio_forget"] = min(ratio, 1 / ratio)
        found["truth_ratio_nonforget"] = max(0.0, 1 - ratio)
    return found


def generation(doc, results):
    """Compare a generation with the answer: ROUGE-L recall, stemmed."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    score = scorer.score(target=doc["answer"], prediction=results[0].strip())
    return {"rougeL_recall": score["rougeL"].recall}
