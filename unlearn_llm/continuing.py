"""A run as one request of a chain: what was forgotten before stays forgotten, and is recorded.

A request that retrains on rows of an earlier one would bring them back, and their text is no longer
at hand. So the retain set of a continued run is filtered by the hashes in the ledger (ledger.py),
which every run of `unlearn train` writes.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import logging

from unlearn_llm import ledger
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.evaluate import Evaluation, on_first_process
from unlearn_llm.evaluation.records import as_json
from unlearn_llm.ledger import Entry
from unlearn_llm.private import PRIVATE
from unlearn_llm.recipe import Recipe
from unlearn_llm.results import RECIPE_FILE
from unlearn_llm.rows import QA

logger = logging.get_logger(__name__)
SECTIONS = ("model", "data", "train")
"""What makes a run the same run, as in results.py."""


class Request:
    """What a run was asked to forget, after whatever the runs before it forgot.

    Every process makes one and calls its methods; the first one reads and writes files.
    """

    def __init__(self, recipe: Recipe, forget: Sequence[QA], *, resume: bool = False) -> None:
        """Check the chain that the run goes on with; nothing is written.

        Args:
            resume: The run itself may have been begun.

        Raises:
            UserError: the run to go on with is unfinished or was changed, its key is missing, or
                the run was begun with other forget rows or from other weights.
        """
        self.recipe = recipe
        self.resume = resume
        PartialState()  # all processes must hash with the first one's key
        self.earlier, self.key = on_first_process(self._begin)
        self.rows = sorted(set(ledger.row_hashes(self.key, forget)))
        self.kept_out = 0
        on_first_process(self._check_same)

    def keep_out(self, retain: Sequence[QA]) -> list[QA]:
        """Give the retain rows that no earlier request asked to forget.

        Raises:
            UserError: none is left.
        """
        forgotten = ledger.rows_asked(self.earlier)
        hashes = ledger.row_hashes(self.key, retain) if forgotten else [""] * len(retain)
        kept = [pair for pair, row in zip(retain, hashes, strict=True) if row not in forgotten]
        self.kept_out = len(retain) - len(kept)
        if not kept:
            raise UserError(
                "data.retain: earlier requests asked to forget every row of it. Give other rows."
            )
        if self.kept_out and PartialState().is_main_process:
            logger.warning(
                f"{self.kept_out} retain rows are left out: earlier requests asked to forget them."
            )
        return kept

    def asked(self) -> None:
        """Record the request; called when the run's folder is its own."""
        on_first_process(self._record_asked)

    def done(self, evaluation: Evaluation | None) -> None:
        """Record what came of it; called when model and scores are saved."""
        on_first_process(lambda: self._record_done(evaluation))

    @property
    def _folder(self) -> Path:
        return self.recipe.output_dir

    def _begin(self) -> tuple[list[Entry], bytes]:
        path = Path(self.recipe.model.path or "").expanduser()
        if not self.recipe.model.continued:
            if self.recipe.model.path and (path / ledger.LEDGER).is_file():
                logger.warning(
                    f"{path} was unlearned before, and its forgotten rows may stand in the retain "
                    f"set. --continue-from {path} keeps them out."
                )
            begun = ledger.read_key(self._folder) if self.resume else None
            return [], begun or ledger.new_key()
        entries = ledger.check_chain(path)
        key = ledger.read_key(path)
        if key is None:
            raise UserError(
                f"{path / PRIVATE / ledger.KEY} is missing: without the key the rows that "
                "were forgotten before are not recognised. Restore it."
            )
        return entries, key

    def _check_same(self) -> None:
        """Refuse to resume a run that is no longer what it was begun as."""
        begun = self._own(ledger.read_ledger(self._folder)) if self.resume else []
        for name, what in (("rows", "forget rows"), ("parent", "weights to begin with")):
            if begun and begun[0][name] != {"rows": self.rows, "parent": self._parent()}[name]:
                raise UserError(
                    f"{self._folder} was begun with other {what}. Restore them to resume, or "
                    "start anew with --overwrite."
                )

    def _record_asked(self) -> None:
        ledger.write_key(self._folder, self.key)
        if self._own(ledger.read_ledger(self._folder)):
            return  # a run that goes on
        entry = ledger.new_entry(
            "asked",
            self._number,
            recipe=self._recipe(),
            objective=self.recipe.objective().name,
            parent=self._parent(),
            forget_rows=len(self.rows),
            retain_rows_left_out=self.kept_out,
            rows=self.rows,
        )
        ledger.write_ledger(self._folder, [*self.earlier, entry])

    def _record_done(self, evaluation: Evaluation | None) -> None:
        entries = ledger.read_ledger(self._folder)
        entry = ledger.new_entry(
            "done",
            self._number,
            weights=ledger.weights_hash(self._folder),
            suite=None if evaluation is None else evaluation.details["suite"]["name"],
            scores=None if evaluation is None else totals(evaluation.details["scores"]),
        )
        if any(_same(entry, known) for known in entries):
            return  # a finished run that was called again
        ledger.write_ledger(self._folder, [*entries, entry])

    @property
    def _number(self) -> int:
        return 1 + sum(entry["event"] == "asked" for entry in self.earlier)

    def _own(self, entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry["request"] == self._number]

    def _parent(self) -> dict[str, Any]:
        """Name the model that the request began with; a folder by its own name only."""
        path = self.recipe.model.path or ""
        weights = self.earlier[-1]["weights"] if self.earlier else None
        return {"name": Path(path).name if Path(path).is_dir() else path, "weights": weights}

    def _recipe(self) -> dict[str, str]:
        settings = as_json({name: self.recipe.document[name] for name in SECTIONS})
        return {
            "name": self.recipe.name,
            "sha256": hashlib.sha256(settings.encode()).hexdigest(),
        }


def carry_over(run: Path, made: Path) -> None:
    """Give a model that was made of a finished run's, by merging, the run's recipe and ledger.

    Raises:
        UserError: see ledger.check_chain.
    """
    entries = ledger.check_chain(run)
    key = ledger.read_key(run)
    if key is not None:
        ledger.write_key(made, key)
    shutil.copyfile(run / RECIPE_FILE, made / RECIPE_FILE)
    done = {**entries[-1], **ledger.new_entry("done", entries[-1]["request"])}
    ledger.write_ledger(
        made, [*entries, {**done, "merged": True, "weights": ledger.weights_hash(made)}]
    )


def totals(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Leave out what composites are made of."""
    return {name: score["value"] for name, score in scores.items() if "/" not in name}


def _same(entry: Entry, known: Entry) -> bool:
    ignored = ("time", "previous")
    return all(known.get(name) == value for name, value in entry.items() if name not in ignored)
