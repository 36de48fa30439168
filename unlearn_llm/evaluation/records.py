"""What an evaluation leaves on disk: records.jsonl, scores.json, roc.json where there are attacks.

Strict JSON; a file is whole or not there. Texts stand in private/records.jsonl only: records.jsonl
beside it has the same rows by number, with their values, and everything that is recomputed,
compared or exported can be made of it.
"""

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.columns import Columns
from unlearn_llm.evaluation.requests import (
    Generation,
    GradientNormResult,
    LogProbResult,
    Result,
    Row,
    TokenMomentsResult,
)
from unlearn_llm.private import PRIVATE, open_private, private_folder

RECORDS = "records.jsonl"
SCORES = "scores.json"
ROC = "roc.json"

Record = dict[str, Any]
"""One probe and sample: what was asked, what came back, the metric values."""


def record_of(probe: str, row: Row, metrics: Mapping[str, float | None]) -> Record:
    """Make the record of one row.

    `results` has, per request key, the loss (nats per token) and the number of tokens, and for
    the plain answer also the log-probability of every token; what membership attacks asked for
    stands there as it came. `generation` has the text. Rows of one `group` belong together.
    """
    sample = row.sample
    generation = row.results.get("generation")
    return {
        "probe": probe,
        "id": sample.id,
        "group": sample.group,
        "question": sample.question,
        "answer": sample.answer,
        "reference": sample.reference,
        "generation": _generation(generation) if isinstance(generation, Generation) else None,
        "results": {
            key: _measured(result, with_tokens=key == "answer")
            for key, result in row.results.items()
            if not isinstance(result, Generation)
        },
        "metrics": {name: _strict(value) for name, value in metrics.items()},
    }


def without_texts(records: Iterable[Record]) -> list[Record]:
    """Give of records what may be shown to anybody: numbers of rows, values and counts.

    Authors are numbered as they come. What stands for every token of a row is left out, too:
    whoever has the model could tell from it whether a guessed text is the row's.
    """
    numbers: dict[str, str] = {}
    return [_without_texts(record, numbers) for record in records]


def _without_texts(record: Record, numbers: dict[str, str]) -> Record:
    author, generation = record.get("group"), record.get("generation")
    return {
        "probe": record["probe"],
        "id": record["id"],
        "group": None if author is None else numbers.setdefault(author, str(len(numbers))),
        "generation": generation and {k: generation.get(k) for k in ("tokens", "finished")},
        "results": {
            key: {name: value for name, value in result.items() if not isinstance(value, list)}
            for key, result in record["results"].items()
        },
        "metrics": record["metrics"],
    }


def ask_the_same(one: Record, other: Record) -> bool:
    """Do two records ask the same? Where texts are not at hand, as far as their lengths say."""
    if all("question" in record for record in (one, other)):
        return all(one.get(key) == other.get(key) for key in ("question", "answer", "reference"))
    lengths = [record.get("results", {}).get("answer", {}).get("tokens") for record in (one, other)]
    return None in lengths or lengths[0] == lengths[1]


def columns_of(records: Iterable[Record]) -> Columns:
    """Turn records into columns: columns[probe][metric], row ids ("id") and authors ("group")."""
    columns: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        of_probe = columns.setdefault(record["probe"], {"id": [], "group": []})
        of_probe["id"].append(record["id"])
        of_probe["group"].append(record.get("group"))
        for metric, value in record["metrics"].items():
            of_probe.setdefault(metric, []).append(value)
    return columns


def read_records(path: str | Path) -> list[Record]:
    """Read records.jsonl, or the one in a folder.

    Raises:
        UserError: no such file, or a line that is not a record.
    """
    path = _file(path)
    if not path.is_file():
        raise UserError(f"There is no file {path} with the records of an evaluation.")
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not the records of an evaluation, nor text.") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            record["probe"], record["id"], record["metrics"].items()
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a record of an evaluation.") from error
        records.append(record)
    return records


def read_private_records(path: str | Path) -> list[Record]:
    """Read the records with their texts, where they are at hand; else those without."""
    file = _file(path)
    private = file.parent / PRIVATE / RECORDS
    return read_records(private if private.is_file() else file)


def write_records(folder: Path, records: Sequence[Record], show_forget_text: bool = False) -> None:
    """Write records: whole into private/, and beside it without texts.

    Args:
        show_forget_text: Write the texts outside private/, too.
    """
    write_json_lines(private_folder(folder) / RECORDS, records, private=True)
    write_json_lines(folder / RECORDS, records if show_forget_text else without_texts(records))


def write_json_lines(path: Path, records: Iterable[Record], private: bool = False) -> None:
    """Write one JSON object per line; the file is whole, or not there."""
    write_whole(path, "".join(as_json(record) + "\n" for record in records), private)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; the file is whole, or not there."""
    write_whole(path, as_json(content, indent=2) + "\n")


def write_whole(path: Path, text: str, private: bool = False) -> None:
    """Write a file by way of another one, so that a killed run leaves the old file or the new.

    Args:
        private: Only its owner may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    opened = open_private if private else _open
    try:
        with opened(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def as_json(content: Any, indent: int | None = None) -> str:
    """Write strict JSON; ValueError for a number that is not finite."""
    # NaN and Infinity are no JSON: readers other than Python's refuse the whole file.
    return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)


def _open(path: Path, mode: str) -> IO[str]:
    return path.open(mode, encoding="utf-8", newline="\n")


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / RECORDS if path.is_dir() else path


def _generation(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "tokens": len(generation.tokens),
        "finished": generation.finished,
    }


def _measured(result: Result, with_tokens: bool) -> dict[str, Any]:
    if isinstance(result, GradientNormResult):
        return {"norm": _strict(result.norm)}
    if isinstance(result, TokenMomentsResult):
        return {name: _all_strict(values) for name, values in vars(result).items()}
    assert isinstance(result, LogProbResult)
    scored: dict[str, Any] = {"loss": _strict(result.loss), "tokens": len(result.token_logps)}
    if with_tokens:
        scored["token_logps"] = _all_strict(result.token_logps)
    return scored


def _all_strict(values: Iterable[float]) -> list[float | None]:
    return [_strict(value) for value in values]


def _strict(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
