import math
import zlib

import pytest

from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.requests import Generate, LogProb, LogProbResult, Row, Sample

SAMPLE = Sample("7", "Who?", "Ann", paraphrased="It is Ann", perturbed=("Bob", "Cid"))


def logps(*values: float, greedy: tuple[bool, ...] | None = None) -> LogProbResult:
    return LogProbResult(values, greedy or (True,) * len(values))


def row(answer: float, paraphrased: float = 1.0, perturbed: tuple[float, ...] = (2.0, 4.0)) -> Row:
    results = {"answer": logps(-answer), "paraphrased": logps(-paraphrased)}
    results |= {f"perturbed/{i}": logps(-loss) for i, loss in enumerate(perturbed)}
    return Row(SAMPLE, results)


def value(name: str, one: Row) -> float | None:
    (only,) = METRICS[name].compute([one])
    return only


def test_metrics_ask_for_what_they_read() -> None:
    answer = {"answer": LogProb("Who?", "Ann")}
    wrong = {"perturbed/0": LogProb("Who?", "Bob"), "perturbed/1": LogProb("Who?", "Cid")}
    right = {"paraphrased": LogProb("Who?", "It is Ann")}
    assert METRICS["probability"].asks(SAMPLE) == answer
    assert METRICS["probability_normalised"].asks(SAMPLE) == answer | wrong
    assert METRICS["truth_ratio"].asks(SAMPLE) == right | wrong
    assert METRICS["rouge"].asks(SAMPLE) == {"generation": Generate("Who?")}


@pytest.mark.parametrize("name", list(METRICS))
def test_nothing_asked_is_nothing_measured(name: str) -> None:
    bare = Sample("0", "Who?", " ")
    metric = METRICS[name]
    # Token entropy and refusals need no answer, only a generation, which is absent here too.
    judge = (lambda pairs: [0.0 for _ in pairs],) if metric.judge else ()
    assert metric.compute([Row(bare, {})], *judge) == [None]
    answerless = ("token_entropy", "refusal_", "harm")
    without = name.startswith(answerless) and not name.startswith("refusal_entailment")
    expected = {Generate("Who?")} if without else set()
    assert set(metric.asks(bare).values()) == expected


@pytest.mark.parametrize("name", list(METRICS))
def test_metrics_cite_their_source(name: str) -> None:
    doc = METRICS[name].compute.__doc__ or ""
    assert "Source:" in doc and "Differs:" in doc


def test_probability_is_per_token() -> None:
    # Two tokens of probability .5 and .125: their geometric mean is .25.
    one = Row(SAMPLE, {"answer": logps(math.log(0.5), math.log(0.125))})
    assert value("probability", one) == pytest.approx(0.25)


def test_probability_against_the_wrong_answers() -> None:
    one = row(-math.log(0.5), perturbed=(-math.log(0.25), -math.log(0.25)))
    assert value("probability_normalised", one) == pytest.approx(0.5)
    eps = 0.5 / (1 + 1e-10)
    assert value("probability_normalised_eps", one) == pytest.approx(eps, abs=1e-15)


def test_truth_ratio_geometric_and_arithmetic() -> None:
    one = row(1.0, paraphrased=1.0, perturbed=(2.0, 4.0))
    assert value("truth_ratio", one) == pytest.approx(math.exp(1 - 3))
    arithmetic = (math.exp(-2) + math.exp(-4)) / 2 / math.exp(-1)
    assert value("truth_ratio_arithmetic", one) == pytest.approx(arithmetic)
    eps = math.exp(-3) / (math.exp(-1) + 1e-10)
    assert value("truth_ratio_eps", one) == pytest.approx(eps, abs=1e-15)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_gives_no_nan(broken: float) -> None:
    one = row(broken, broken, (broken, broken))
    for name in METRICS:
        if METRICS[name].judge is None:
            found = value(name, one)
            assert found is None or math.isfinite(found)


def test_a_collapsed_model_keeps_a_finite_ratio() -> None:
    assert value("truth_ratio", row(1.0, 5000.0, (1.0, 1.0))) == math.exp(700)
    assert value("truth_ratio", row(1.0, 1.0, (5000.0, 5000.0))) == math.exp(-700)
    assert value("probability_normalised", row(5000.0, perturbed=(5000.0, 5000.0))) == 1 / 3


def test_one_wrong_answer_without_a_result_is_not_left_out() -> None:
    results = {key: found for key, found in row(1.0).results.items() if key != "perturbed/1"}
    assert value("truth_ratio", Row(SAMPLE, results)) is None


@pytest.mark.parametrize(
    ("greedy", "memorized", "strength"),
    [
        # The last position is the end token and does not count.
        ((True, True, True, True, False), 1.0, 1.0),
        ((False, True, True, True, True), 3 / 4, 3 / 4),
        ((True, True, False, True, True), 3 / 4, 1 / 4),
        ((True, True, True, False, True), 3 / 4, 1 / 4),  # no suffix: still 1/n
        ((True,), None, 0.0),
    ],
)
def test_memorization(greedy: tuple[bool, ...], memorized: float | None, strength: float) -> None:
    one = Row(SAMPLE, {"answer": logps(*(-1.0 for _ in greedy), greedy=greedy)})
    assert value("exact_memorization", one) == memorized
    assert value("extraction_strength", one) == strength


def test_membership_scores_by_hand() -> None:
    # Five tokens without the end token: the lowest int(.4 * 5) = 2 are -6 and -4.
    one = Row(SAMPLE, {"answer": logps(-1.0, -6.0, -2.0, -4.0, -1.0, -10.0)})
    assert value("mia_loss", one) == pytest.approx(4.0)
    assert value("mia_zlib", one) == pytest.approx(4.0 / len(zlib.compress(b"Ann")))
    assert value("mia_min_k", one) == pytest.approx(5.0)
    assert value("mia_min_k", Row(SAMPLE, {"answer": logps(-3.0, -1.0)})) == 3.0
    assert value("mia_min_k", Row(SAMPLE, {"answer": logps(-1.0)})) == 0.0
