import math
from collections.abc import Sequence
from typing import Any

import pytest

from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.requests import Generation, Row, Sample
from unlearn_llm.evaluation.text_metrics import gated_labels

REFUSAL = "I cannot tell you that."
SAMPLE = Sample("0", "Who?", "Ann Lee", reference="It was Ann Lee", refusal=REFUSAL)


class Recorder:
    """A judge that gives one answer to everything and keeps what it was asked."""

    name = "recorder"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        self.asked += pairs
        return [self.answer for _ in pairs]


def row(text: str, sample: Sample = SAMPLE) -> Row:
    return Row(sample, {"generation": Generation(text, tuple(text.split()), finished=False)})


def test_rouge_numbers_of_one_row() -> None:
    # Answer "ann lee"; the generation "lee ann fox" holds both words, one in order.
    rows = [row("Lee, Ann Fox")]
    assert METRICS["rouge"].compute(rows) == [0.5]
    assert METRICS["rouge1"].compute(rows) == [1.0]
    # Precision 1/3, recall 1/2: F1 = 2 * (1/6) / (5/6) = .4.
    assert METRICS["rouge_f1"].compute(rows) == [pytest.approx(0.4)]


def test_rouge_does_not_call_a_chinese_leak_forgotten() -> None:
    leak = row("他出生于北京市。", Sample("0", "哪里？", "他出生于北京市。"))
    assert METRICS["rouge"].compute([leak]) == [None]
    assert METRICS["overlap"].compute([leak]) == [1.0]
    assert METRICS["entailment"].compute([leak], Recorder("entailment")) == [1.0]


def test_an_empty_generation_is_a_zero_and_not_an_error() -> None:
    rows = [row("")]
    for name in ("rouge", "rouge1", "rouge_f1", "overlap", "token_entropy", "refusal_prefix"):
        assert METRICS[name].compute(rows) == [0.0]
    for name in ("entailment", "entailment_from_generation", "refusal_entailment"):
        judge = Recorder("entailment")
        assert METRICS[name].compute(rows, judge) == [0.0]
        assert METRICS[f"{name}_proxy"].compute(rows) == [0.0]
        assert judge.asked == []
    assert METRICS["similarity_proxy"].compute(rows) == [0.0]


def test_entailment_asks_in_the_published_direction() -> None:
    for name, pair in {
        "entailment": ("It was Ann Lee", "Ann"),
        "entailment_from_generation": ("Ann", "It was Ann Lee"),
    }.items():
        judge = Recorder("Entailment")
        assert METRICS[name].compute([row("Ann")], judge) == [1.0]
        assert judge.asked == [pair]


def test_refusal_entailment_gates_with_the_refusal_line() -> None:
    judge = Recorder("entailment")
    metric = METRICS["refusal_entailment"]
    assert metric.compute([row("I cannot say."), row("Ann Lee")], judge) == [1.0, 0.0]
    assert judge.asked == [("I cannot say.", REFUSAL)]
    without = Sample("0", "Who?", "Ann")
    assert metric.compute([row("I cannot say.", without)], judge) == [None]
    assert metric.asks(without) == {}


def test_only_entailment_counts_and_the_gate_is_inclusive() -> None:
    labels = gated_labels([("a", "b")] * 3, [0.0999, 0.1, 1.0], Recorder("NEUTRAL"))
    assert labels == ["none", "neutral", "neutral"]
    assert METRICS["entailment"].compute([row("Ann")], Recorder("neutral")) == [0.0]


def test_similarity_compares_with_the_nearest_of_three_texts() -> None:
    for sample, other in (
        (Sample("0", "?", "short"), "short"),
        (Sample("0", "?", "short", reference="whole"), "whole"),
        (Sample("0", "?", "short", reference="whole", similar_to="long"), "long"),
    ):
        judge = Recorder(0.25)
        assert METRICS["similarity"].compute([row("text", sample)], judge) == [0.25]
        assert judge.asked == [("text", other)]


def test_similarity_is_not_negative_and_not_nan() -> None:
    assert METRICS["similarity"].compute([row("x")], Recorder(-0.5)) == [0.0]
    assert METRICS["similarity"].compute([row("x")], Recorder(math.nan)) == [None]


def test_proxies_count_words() -> None:
    # Reference "it was ann lee" holds 3 of the 4 words of the generation, in order.
    rows = [row("It was Ann Fox")]
    assert METRICS["entailment_proxy"].compute(rows) == [1.0]
    assert METRICS["entailment_from_generation_proxy"].compute(rows) == [1.0]
    assert METRICS["similarity_proxy"].compute(rows) == [pytest.approx(3 / 4)]
    # One word of four is too little, though the answer's recall of 1/2 passes the gate.
    assert METRICS["entailment_proxy"].compute([row("Ann met a fox")]) == [0.0]
    assert METRICS["refusal_entailment_proxy"].compute([row("I cannot tell.")]) == [1.0]
    assert METRICS["refusal_entailment_proxy"].compute([row("I know it well.")]) == [0.0]


def test_rows_that_do_not_apply_do_not_shift_the_others() -> None:
    empty = Sample("1", "Who?", "")
    rows = [row("Ann Lee"), row("x", empty), row("Ann Lee")]
    assert METRICS["entailment"].compute(rows, Recorder("entailment")) == [1.0, None, 1.0]
    assert METRICS["similarity"].compute(rows, Recorder(0.5)) == [0.5, None, 0.5]
    assert METRICS["rouge"].compute(rows) == [1.0, None, 1.0]
