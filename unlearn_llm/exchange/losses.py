"""Metrics of likelihood from the losses of a row, as records and other projects' logs have them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.records import Record
from unlearn_llm.evaluation.requests import LogProbResult, Row, Sample

OF_ONE_ANSWER = ("probability", "mia_loss")
AGAINST_WRONG = (
    "probability_normalised",
    "probability_normalised_eps",
    "truth_ratio",
    "truth_ratio_eps",
)


@dataclass(frozen=True)
class Losses:
    """Nats per token of the answers to one question; None: not known."""

    answer: float | None = None
    paraphrased: float | None = None
    perturbed: Sequence[float] = ()

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Losses":
        """Take the losses out of a record."""
        results = record.get("results") or {}
        wrong = [results.get(f"perturbed/{i}") for i in range(len(results))]
        return cls(
            (results.get("answer") or {}).get("loss"),
            (results.get("paraphrased") or {}).get("loss"),
            [each["loss"] for each in wrong if each and each["loss"] is not None],
        )

    def results(self) -> dict[str, dict[str, Any]]:
        """Give them as the `results` of a record; how many tokens they are of is not known."""
        named = {"answer": self.answer, "paraphrased": self.paraphrased}
        named |= {f"perturbed/{index}": loss for index, loss in enumerate(self.perturbed)}
        return {k: {"loss": loss, "tokens": None} for k, loss in named.items() if loss is not None}

    def metrics(self) -> dict[str, float | None]:
        """Compute every metric of likelihood that can be made of them."""
        known = {name: result["loss"] for name, result in self.results().items()}
        row = Row(
            Sample("0", "", "answer", "answer", tuple("wrong" for _ in self.perturbed)),
            {name: LogProbResult((-loss,), (True,)) for name, loss in known.items()},
        )
        names = [*OF_ONE_ANSWER] if self.answer is not None else []
        names += AGAINST_WRONG if self.perturbed else ()
        found = {name: METRICS[name].compute([row])[0] for name in names}
        return {name: value for name, value in found.items() if value is not None}


def with_likelihoods(records: Iterable[Record]) -> list[Record]:
    """Give records every metric of likelihood that their losses give; what they have stays."""
    return [
        {**record, "metrics": Losses.of_record(record).metrics() | record["metrics"]}
        for record in records
    ]


def finite(value: Any) -> float | None:
    """Give a number of another project's log; None for none, NaN and infinity."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
