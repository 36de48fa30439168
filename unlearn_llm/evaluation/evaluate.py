"""Runs a suite on a model: ask everything once, measure, score, write."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from unlearn_llm.encode import Encoder, row_list
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.aggregates import Score
from unlearn_llm.evaluation.intervals import with_intervals
from unlearn_llm.evaluation.journal import Journal, read_journal, remove_journal
from unlearn_llm.evaluation.judges import Judges, NotLoaded
from unlearn_llm.evaluation.lm_eval import (
    TaskResult,
    facts,
    load_tasks,
    run_tasks,
    with_notes,
    with_scores,
)
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.provenance import versions
from unlearn_llm.evaluation.records import (
    ROC,
    SCORES,
    Record,
    columns_of,
    read_records,
    record_of,
    write_json,
    write_records,
)
from unlearn_llm.evaluation.requests import (
    Generate,
    GradientNorm,
    Judge,
    LogProb,
    Metric,
    Request,
    Result,
    Row,
    Sample,
    TokenMoments,
)
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.samples import Samples, samples_of
from unlearn_llm.evaluation.suite import Suite, as_plain
from unlearn_llm.evaluation.suite_scores import curves_of, score_all
from unlearn_llm.evaluation.vllm_runner import VllmRunner

REQUEST_KINDS = {
    LogProb: "scored",
    Generate: "generated",
    TokenMoments: "moments",
    GradientNorm: "gradients",
}
T = TypeVar("T")
Column = list[float | None]


@dataclass(frozen=True)
class Evaluation:
    """What came out of one model.

    Attributes:
        scores: By name, in the suite's order.
        details: What scores.json holds: the scores, how they were made, and of what.
        records: One per probe and sample.
    """

    scores: dict[str, Score]
    details: dict[str, Any]
    records: list[Record] = field(repr=False)

    @property
    def values(self) -> dict[str, float]:
        """The scores that were measured."""
        return {name: s.value for name, s in self.scores.items() if s.value is not None}


def evaluate(
    suite: Suite,
    model: Any,
    encoder: Encoder,
    output_dir: str | Path | None = None,
    *,
    reference_records: str | Path | None = None,
    show_forget_text: bool = False,
    judges: Mapping[str, Judge] | None = None,
    token_budget: int | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Run a suite on a model and write records.jsonl and scores.json.

    Until they are written the folder keeps the answers as they come; an interrupted evaluation of
    the same model with the same questions and settings goes on from there.

    With several processes all of them must call this; the requests are shared out, the first one
    measures and writes, and all get the evaluation.

    Args:
        model: A causal language model (a module), or a `vllm.LLM`.
        output_dir: None: nothing is written.
        reference_records: In place of `suite.reference`.
        show_forget_text: See write_records.
        judges: By kind, in place of those that the suite names.
        token_budget, progress: See Runner.

    Raises:
        UserError: data, reference or an answer cannot be read.
    """
    started = time.perf_counter()
    encoder = _encoder_of(suite, encoder)
    names = {kind: judge.name for kind, judge in (judges or {}).items()}
    suite = suite.model_copy(update={"judges": {**suite.judges, **names}}).with_proxies()
    reference_path = reference_records or suite.reference
    # Before anything expensive: a mistyped path must not show after an hour.
    reference = columns_of(read_records(reference_path)) if reference_path else None
    tasks = load_tasks(suite, model)
    probes = {name: samples_of(suite, name) for name in suite.own_probes}
    asked = {name: [_asks(suite, name, s) for s in p.samples] for name, p in probes.items()}
    limits = {name: getattr(suite, name) for name in ("max_new_tokens", "max_total_tokens")}
    runner: Runner | VllmRunner
    if isinstance(model, nn.Module):
        runner = Runner(model, encoder, token_budget=token_budget, progress=progress, **limits)
    else:
        runner = VllmRunner(model, encoder, progress=progress, **limits)
    requests = [request for rows in asked.values() for row in rows for request in row.values()]
    subject = on_first_process(runner.describe)
    try:
        journal = _journal(output_dir, {**subject, **runner.origin(requests), **versions()})
        answers = runner.run(requests, journal)
    except UserError:
        _name_faults(encoder, probes, asked)
        raise
    answered = time.perf_counter()

    def measure() -> Evaluation:
        of_tasks = run_tasks(tasks, suite, model, encoder.tokenizer)
        scored = with_scores(suite, of_tasks)
        rows = {
            name: [
                Row(sample, {key: answers[request] for key, request in requests.items()})
                for sample, requests in zip(probes[name].samples, asked[name], strict=True)
            ]
            for name in probes
        }
        judged = _Judged(suite, judges or {})
        columns = _measure(suite, rows, judged)
        judged.release()
        records = _records(rows, columns)
        reasons = dict(judged.reasons)
        for result in of_tasks.values():
            records += result.records
            reasons |= result.reasons
        found = columns_of(records)
        scores = score_all(scored, found, reference, reasons)
        scores, intervals = with_intervals(scored, scores, found, reference)
        scores = with_notes(scored, scores, of_tasks)
        details = {
            **scores_json(scored, scores, of_tasks),
            "intervals": intervals,
            "not_measured": reasons,
            "judges": judged.names,
            "probes": {name: _probe_json(columns[name], probes[name].notes) for name in probes},
            "tasks": {name: result.about for name, result in of_tasks.items()},
            "requests": _count(answers),
            "reference": str(reference_path) if reference_path else None,
            "model": subject,
            "suite": as_plain(scored),
            "versions": versions(),
            "seconds": {
                "answers": round(answered - started, 3),
                "all": round(time.perf_counter() - started, 3),
            },
        }
        if output_dir is not None:
            write_records(Path(output_dir), records, show_forget_text)
            if curves := curves_of(suite, found, reference):
                write_json(Path(output_dir) / ROC, curves)
            write_json(Path(output_dir) / SCORES, details)
            remove_journal(Path(output_dir))
        return Evaluation(scores, details, records)

    return on_first_process(measure)


def recompute(
    records_path: str | Path,
    suite: Suite,
    *,
    reference_records: str | Path | None = None,
    not_measured: Mapping[str, str] | None = None,
) -> dict[str, Score]:
    """Make the scores from records, without a model.

    Args:
        records_path: records.jsonl, or its folder.
        not_measured: Why metrics have no values, as scores.json has it; it enters the notes.
    """
    reference_path = reference_records or suite.reference
    reference = columns_of(read_records(reference_path)) if reference_path else None
    columns = columns_of(read_records(records_path))
    suite = suite.with_proxies()
    scores = score_all(suite, columns, reference, not_measured or {})
    return with_intervals(suite, scores, columns, reference)[0]


def on_first_process(function: Callable[[], T]) -> T:
    """Call a function on the first process only; all processes get its result, or its error."""
    if not _distributed():
        return function()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # the others wait for an outcome, whatever it is
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _encoder_of(suite: Suite, encoder: Encoder) -> Encoder:
    """Give the encoder with what the suite says in place of the model's settings."""
    return replace(
        encoder,
        template=suite.template or encoder.template,
        max_length=suite.max_length or encoder.max_length,
    )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Judged:
    """The judges of a suite, with the reasons for those that are missing."""

    def __init__(self, suite: Suite, given: Mapping[str, Judge]) -> None:
        self._sources = {str(kind): source for kind, source in suite.judges.items()}
        self._judges = Judges(self._sources)
        self._asked = {kind: _Once(judge) for kind, judge in given.items()}
        self.reasons: dict[str, str] = {}
        """By metric."""
        self.names: dict[str, str] = {}
        """By kind; the judges that were used."""

    def column(self, name: str, metric: Metric, rows: Sequence[Row]) -> Column:
        """Let the judge of a metric read the rows; all None, and a reason, where there is none."""
        assert metric.judge is not None
        kind = metric.judge
        if kind not in self._asked:
            if not self._sources.get(kind):
                self.reasons[name] = f"The suite names no {kind} judge."
                return [None] * len(rows)
            judge = self._judges[kind]
            if isinstance(judge, NotLoaded):
                self.reasons[name] = str(judge)
                return [None] * len(rows)
            self._asked[kind] = _Once(judge)
        self.names[kind] = self._asked[kind].name
        return metric.compute(rows, self._asked[kind])

    def release(self) -> None:
        """Set the judges' memory free."""
        self._judges.release()


class _Once:
    """A judge that is asked once for every distinct pair, whichever metric asks."""

    def __init__(self, judge: Judge) -> None:
        self.name = judge.name
        self._judge = judge
        self._verdicts: dict[tuple[str, str], Any] = {}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Judge each pair."""
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in self._verdicts]
        if fresh:
            self._verdicts.update(zip(fresh, self._judge(fresh), strict=True))
        return [self._verdicts[pair] for pair in pairs]


def _journal(output_dir: str | Path | None, origin: Mapping[str, Any]) -> Journal | None:
    """Open the journal of a folder; where its name changes nothing, a model is the same model."""
    if output_dir is None:
        return None
    folder = Path(output_dir)
    nameless = {key: value for key, value in origin.items() if key != "name"}
    answers = on_first_process(lambda: read_journal(folder, nameless))
    process = torch.distributed.get_rank() if _distributed() else 0
    return Journal(folder, nameless, answers, process)


def _asks(suite: Suite, probe: str, sample: Sample) -> dict[str, Request]:
    """Collect what the metrics of a probe ask about a sample; a key means one request in all."""
    requests: dict[str, Request] = {}
    for metric in suite.probes[probe].metrics:
        for key, request in METRICS[metric].asks(sample).items():
            if requests.setdefault(key, request) != request:
                raise ValueError(f"Two metrics of probe {probe!r} mean unlike requests by {key!r}.")
    return requests


def _measure(
    suite: Suite, rows: Mapping[str, Sequence[Row]], judged: _Judged
) -> dict[str, dict[str, Column]]:
    """Compute every metric of every probe; those that need a judge last."""
    columns: dict[str, dict[str, Column]] = {name: {} for name in rows}
    for with_judge in (False, True):
        for probe in rows:
            for name in suite.probes[probe].metrics:
                metric = METRICS[name]
                if bool(metric.judge) != with_judge:
                    continue
                if metric.judge:
                    columns[probe][name] = judged.column(name, metric, rows[probe])
                else:
                    columns[probe][name] = metric.compute(rows[probe])
    return columns


def _records(
    rows: Mapping[str, Sequence[Row]], columns: Mapping[str, Mapping[str, Column]]
) -> list[Record]:
    return [
        record_of(probe, row, {name: column[i] for name, column in columns[probe].items()})
        for probe in rows
        for i, row in enumerate(rows[probe])
    ]


def scores_json(
    suite: Suite, scores: Mapping[str, Score], of_tasks: Mapping[str, TaskResult] | None = None
) -> dict[str, Any]:
    """Give the scores as scores.json has them.

    Args:
        suite: With its proxies put in place.
        of_tasks: What came out of lm-eval's tasks, which have more to say.
    """
    made = zip(scores.items(), suite.scores.values(), strict=True)
    return {
        "scores": {
            name: {
                **asdict(score),
                "aggregate": of_suite.aggregate,
                **facts(of_suite, of_tasks or {}),
            }
            for (name, score), of_suite in made
        }
    }


def _probe_json(columns: Mapping[str, Column], notes: Sequence[str]) -> dict[str, Any]:
    rows = max((len(column) for column in columns.values()), default=0)
    skipped = {name: sum(v is None for v in column) for name, column in columns.items()}
    return {
        "rows": rows,
        "skipped": {name: count for name, count in skipped.items() if count},
        "notes": list(notes),
    }


def _count(answers: Mapping[Request, Result]) -> dict[str, int]:
    kinds = Counter(type(request) for request in answers)
    return {what: kinds[kind] for kind, what in REQUEST_KINDS.items() if kinds[kind]}


def _name_faults(
    encoder: Encoder,
    probes: Mapping[str, Samples],
    asked: Mapping[str, Sequence[Mapping[str, Request]]],
) -> None:
    """Say which rows of which probe cannot be encoded: the runner knows only requests."""
    for name, rows in asked.items():
        faults: dict[str, UserError] = {}
        for sample, row in zip(probes[name].samples, rows, strict=True):
            for request in row.values():
                try:
                    if not isinstance(request, Generate):
                        encoder.pairs([request.question], [request.answer])
                except UserError as error:
                    faults.setdefault(sample.id, error)
        if faults:
            reason = next(iter(faults.values()))
            rows_named = row_list(int(row) for row in faults)
            raise UserError(f"Probe {name!r}, {rows_named}; the first: {reason}") from reason
