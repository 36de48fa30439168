"""A suite at steps of a training run: scores on disk by step, and the trade-off they draw."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers.utils import logging

from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import (
    Evaluation,
    evaluate,
    on_first_process,
    scores_json,
)
from unlearn_llm.evaluation.figure import draw
from unlearn_llm.evaluation.records import (
    SCORES,
    Record,
    ask_the_same,
    columns_of,
    read_private_records,
    write_json,
)
from unlearn_llm.evaluation.report import read_details
from unlearn_llm.evaluation.suite import Suite, as_plain
from unlearn_llm.evaluation.suite_scores import score_all
from unlearn_llm.evaluation.trade_off import (
    Curve,
    check_alike,
    check_curves,
    choose_axes,
    read_curve,
    step_folder,
    write_csv,
)

logger = logging.get_logger(__name__)
CSV = "trade_off.csv"
FIGURES = ("trade_off.svg", "trade_off.png")


class DuringTraining:
    """Measures a model at steps of a run.

    Every evaluation leaves step-N/scores.json, without any text, and trade_off.csv is written
    anew, so a killed run keeps what it measured and a resumed one adds to it.

    Args:
        folder: The evaluation folder of the run.
        suite: Usually with a smaller limit than the one at the end of the run.
        reference: records.jsonl of the gold model.
        target: records.jsonl of the model before unlearning.
    """

    def __init__(
        self,
        folder: Path,
        suite: Suite,
        encoder: Encoder,
        reference: str | Path | None = None,
        target: str | Path | None = None,
    ) -> None:
        self.folder = folder
        self.suite, self.encoder = suite, encoder
        self.reference = reference or suite.reference
        self._marks = {"target": target, "gold": self.reference}

    def check_earlier(self) -> None:
        """Refuse to go on where earlier steps of the run were measured otherwise.

        Raises:
            UserError: the first setting that differs.
        """
        if self._has_steps():
            earlier = next(iter(self._curve().steps.values()))["suite"]
            ours = as_plain(self.suite.with_proxies())
            check_alike({"earlier steps": {"suite": earlier}, "this run": {"suite": ours}}, False)

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Evaluate the model of a step; all processes call this.

        Returns:
            The scores that were measured.
        """
        evaluation = evaluate(self.suite, model, self.encoder, reference_records=self.reference)
        on_first_process(lambda: self._keep(evaluation, step))
        return evaluation.values

    def finish(self) -> None:
        """Draw the curve; where that cannot be done, say so in one line."""
        if not self._has_steps():
            return
        try:
            curves = [self._curve()]
            check_curves(curves)
            axes = choose_axes(curves)
            for name in FIGURES:
                draw(self.folder / name, curves, axes)
        except UserError as error:
            logger.warning(f"{self.folder / CSV} is written, but no figure: {error}")

    def _keep(self, evaluation: Evaluation, step: int) -> None:
        write_json(step_folder(self.folder, step) / SCORES, {"step": step, **evaluation.details})
        for mark, records in self._marks.items():
            if records is None:
                continue
            try:
                write_json(self.folder / mark / SCORES, same_rows(evaluation, records))
            except UserError as error:
                logger.warning(f"No point for {mark} beside the curve: {error}")
        self._marks.clear()  # the rows are the same at every step
        write_csv(self.folder / CSV, [self._curve()])

    def _curve(self) -> Curve:
        return read_curve(self.folder, self.folder.parent.name)

    def _has_steps(self) -> bool:
        return any(self.folder.glob(f"step-*/{SCORES}"))


def same_rows(evaluation: Evaluation, records: str | Path) -> Mapping[str, object]:
    """Score the records of another model on the rows of an evaluation, as that one was scored.

    Raises:
        UserError: rows are missing there, or other judges read them.
    """
    beside = Path(records).expanduser()
    beside = (beside if beside.is_dir() else beside.parent) / SCORES
    details = evaluation.details
    if beside.is_file() and read_details(beside).get("judges") != details["judges"]:
        raise UserError(f"{records} was read by other judges than the run.")
    there = {_row(record): record for record in read_private_records(records)}
    wanted = {_row(record): record for record in evaluation.records}
    # Ids alone are numbers, which other splits have as well.
    missing = [
        row for row in wanted if row not in there or not ask_the_same(wanted[row], there[row])
    ]
    if missing:
        probe, row = missing[0]
        raise UserError(
            f"{records} lacks {len(missing)} of the {len(wanted)} rows of the run, such as row "
            f"{row} of probe {probe!r}."
        )
    suite = Suite(**details["suite"])
    made = score_all(suite, columns_of(there[row] for row in wanted))
    return {
        **scores_json(suite, made),
        "judges": details["judges"],
        "model": {},
        "suite": as_plain(suite),
    }


def _row(record: Record) -> tuple[str, str]:
    return record["probe"], record["id"]
