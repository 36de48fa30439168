"""Where rows come from: files, the hub, TOFU by name, generated authors; and what is wrong in them.

Private rows are read into memory only: no data-set cache keeps a copy of what is to be forgotten.
"""

import csv
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_llm import synthetic
from unlearn_llm.data_sets import DATA_SETS, find_file, hub_address
from unlearn_llm.encode import row_list
from unlearn_llm.errors import UserError
from unlearn_llm.registry import did_you_mean

COLUMN_NAME = re.compile(r"[\w.-]{1,40}")
COLUMN_PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
ALTERNATE_COLUMN = "alternate"
MAX_TEXT = 1_000_000
"""Letters of a question or an answer: longer ones are no question, but a file in one line."""
MAX_LINE = 16 * MAX_TEXT
MAX_BYTES = 2**31
"""Of what is read as a whole: .json, and the content of .parquet."""


class QA(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    alternate: str | None = None
    """Another answer to the question, as plausible as the original."""

    def __repr__(self) -> str:
        """Show no text: a representation ends in messages and logs."""
        return f"QA(<{', '.join(str(len(text)) for text in self if text is not None)} characters>)"


def load_rows(source: str, folder: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Load rows as dicts.

    Args:
        source: One of
            - a file: .json (a list, one object per line, or one object of columns), .jsonl, .csv,
              .parquet;
            - "tofu/SPLIT", or another name of data_sets.DATA_SETS and a file of it: from `folder`
              if given, else from the hub;
            - "synthetic/SPLIT": generated authors, split names as in TOFU;
            - "owner/name", "owner/name:config", "owner/name:config:split": a hub data set.
        folder: Folder with the data set's files (`forget10.json`...), or with folders of them.
        seed: Seed of generated authors.

    Raises:
        UserError: the file, split or data set is missing, empty or unreadable.
    """
    kind, _, name = source.partition("/")
    if kind == "synthetic":
        return synthetic.generate(name, seed=seed)
    if kind in DATA_SETS and folder is not None:
        return read_file(find_file(kind, Path(folder), name, READERS))
    if kind in DATA_SETS:
        return _read_hub(hub_address(kind, name))
    path = Path(source).expanduser()
    if path.suffix in READERS or path.exists():
        return read_file(path)
    return _read_hub(source)


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read a .json, .jsonl, .csv or .parquet file.

    Raises:
        UserError: naming the file, and the line where one cannot be parsed.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it.")
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")])
        raise UserError(f"There is no file {path}.{near}")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: expected {', '.join(READERS)}, got {path.suffix!r}.")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None  # its representation has the whole file in it
    if not rows:
        raise UserError(f"{path} holds no rows. Give at least one.")
    return rows


def as_pairs(rows: Sequence[QA] | Sequence[Mapping[str, Any]], where: str) -> list[QA]:
    """Give pairs as they are; find question and answer in rows of another layout.

    Raises:
        UserError: there are no rows, or their layout is unknown.
    """
    if not len(rows):
        raise UserError(f"{where} holds no rows.")
    if isinstance(rows[0], QA):
        return list(rows)  # type: ignore[arg-type]  # all are what the first is
    return to_pairs(list(rows), where)  # type: ignore[arg-type]


def to_pairs(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[QA]:
    """Find question and answer in every row.

    Known layouts: question/answer, prompt/completion, instruction/output, and `messages` (the last
    user turn and the assistant's reply). Other names are given by the two column arguments.
    A column `alternate`, where there is one, holds another answer.

    Raises:
        UserError: no known layout, a row without the column, a value that is not text.
    """
    if not rows:
        raise UserError(f"{where} holds no rows.")
    if question_column is None and answer_column is None and "messages" in rows[0]:
        return [_from_messages(row, where, number) for number, row in enumerate(rows)]
    question_column, answer_column = _columns(rows[0], where, question_column, answer_column)
    pairs = []
    for number, row in enumerate(rows):
        values = [row.get(column) for column in (question_column, answer_column)]
        for column, value in zip((question_column, answer_column), values, strict=True):
            _check_text(value, f"{where}, row {number}: column {column!r}")
        pairs.append(QA(str(values[0]), str(values[1]), _alternate(row, where, number)))
    return pairs


def column_names(row: Mapping[Any, Any]) -> str:
    """List the columns of a row for a message.

    What is no plain name is counted only: in a file without a header line it is a row's text.
    """
    plain = [str(name) for name in row if COLUMN_NAME.fullmatch(str(name))]
    others = len(row) - len(plain)
    counted = [f"{others} without a plain name (is there a header line?)"] if others else []
    return ", ".join([*plain, *counted])


def check_disjoint(forget: Sequence[QA], retain: Sequence[QA], allow_overlap: bool = False) -> None:
    """Refuse forget rows that also stand in the retain set: one would undo the other.

    Compares question and answer without case and repeated blanks, and however accents are coded.
    """
    kept = {normal(pair) for pair in retain}
    shared = [row for row, pair in enumerate(forget) if normal(pair) in kept]
    if shared and not allow_overlap:
        raise UserError(
            f"{len(shared)} forget rows also stand in the retain set (forget "
            f"{row_list(shared)}), so they would be learnt again while they are forgotten. "
            "Remove them from the retain set, or set data.allow_overlap: true."
        )


def split_tasks(
    rows: Sequence[Mapping[str, Any]], task_id: str, where: str
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Split closer-look rows into those of one task and the others (which are retained).

    Source: sail-sg/closer-look-LLM-unlearning forget.py: the retain set of a task is the retain
    file and every task that is not unlearned.
    """
    known = sorted({str(row.get("task_id")) for row in rows})
    if task_id not in known:
        raise UserError(f"{where}: no row with task_id {task_id!r}; it has {', '.join(known)}.")
    chosen = [row for row in rows if str(row["task_id"]) == task_id]
    return chosen, [row for row in rows if str(row["task_id"]) != task_id]


def normal(pair: QA) -> tuple[str, str]:
    """Give a pair without what does not make it another one: case, blanks, coding of accents."""
    question, answer = (unicodedata.normalize("NFC", text.casefold()) for text in pair[:2])
    return " ".join(question.split()), " ".join(answer.split())


def _columns(
    row: Mapping[str, Any], where: str, question: str | None, answer: str | None
) -> tuple[str, str]:
    for known_question, known_answer in COLUMN_PAIRS:
        pair = (question or known_question, answer or known_answer)
        if pair[0] in row and pair[1] in row:
            return pair
    asked = [name for name in (question, answer) if name and name not in row]
    wanted = f"column {asked[0]!r}" if asked else "columns question and answer"
    names = column_names(row)
    near = did_you_mean(asked[0] if asked else "answer", names.split(", "))
    raise UserError(
        f"{where}: expected {wanted} (or prompt/completion, or messages); it has "
        f"{names}.{near} Name them with data.question_column and "
        "data.answer_column."
    )


def _alternate(row: Mapping[str, Any], where: str, number: int) -> str | None:
    value = row.get(ALTERNATE_COLUMN)
    if value is not None:
        _check_text(value, f"{where}, row {number}: column {ALTERNATE_COLUMN!r}")
    return value


def _from_messages(row: Mapping[str, Any], where: str, number: int) -> QA:
    try:
        turns = [(message["role"], message["content"]) for message in row["messages"]]
        reply = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
        asked = max(i for i, (role, _) in enumerate(turns[:reply]) if role == "user")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{where}, row {number}: messages should hold a user turn and an assistant's reply, "
            "each with role and content."
        ) from error
    for turn in (asked, reply):
        _check_text(turns[turn][1], f"{where}, row {number}: message {turn}")
    return QA(turns[asked][1], turns[reply][1], _alternate(row, where, number))


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{what} should hold text, got {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a character (a lone surrogate) at position {error.start}, which "
            "no tokenizer can read. Remove it."
        ) from None  # its representation has the text in it
    if len(value) > MAX_TEXT:
        raise UserError(
            f"{what} holds {len(value)} letters, expected at most {MAX_TEXT}. Split the row."
        )


def _read_json(path: Path) -> list[dict[str, Any]]:
    _check_size(path.stat().st_size, path)
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return _objects(_texts_as_rows(_parsed(text, path)), path)
    columns = _text_columns(text)
    return _read_json_lines(path) if columns is None else _rows_of(columns, path)


def _texts_as_rows(rows: Any) -> Any:
    """Make rows of a bare list of texts (MUSE has such files)."""
    bare = isinstance(rows, list) and all(isinstance(row, str) for row in rows)
    return [{"text": row} for row in rows] if bare else rows


def _text_columns(text: str) -> dict[str, list[str]] | None:
    """Give the columns of a file that is one object of them, as the safety sets are."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None  # more than one object, or none: its lines are read one by one
    if not isinstance(content, dict) or not content:
        return None
    texts = all(
        isinstance(column, list) and all(isinstance(value, str) for value in column)
        for column in content.values()
    )
    return {name: column for name, column in content.items() if column} if texts else None


def _rows_of(columns: Mapping[str, list[str]], path: Path) -> list[dict[str, Any]]:
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise UserError(f"{path}: expected columns of one length, got {lengths}.")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Lines end with \n alone: U+2028 and its like may stand inside a JSON string.
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{where}: expected at most {MAX_LINE} bytes. Split the row.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 text ({error.reason}). Save it as UTF-8."
                ) from None  # its representation has the line in it
            if text.strip():
                rows.append(_parsed(text, path, number))
    return _objects(rows, path)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Read JSON, one line of a file or all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line or error.lineno}"
        expected = "expected a list of objects, or one object in each line"
        raise UserError(
            f"{where}: not JSON ({error.msg}); {expected}."
        ) from None  # it has the text
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        where = f"{path}, line {line}" if line else str(path)
        reason = "nested too deeply" if deep else "a number with too many digits"
        raise UserError(f"{where}: {reason}; expected objects of texts.") from None


def _check_size(size: int, path: Path) -> None:
    if size > MAX_BYTES:
        raise UserError(
            f"{path}: {size} bytes at once, expected at most {MAX_BYTES}. Write it as .jsonl, "
            "which is read line by line."
        )


def _objects(rows: Any, path: Path) -> list[dict[str, Any]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object, got {type(row).__name__}.")
    return list(rows)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            return list(reader)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num + 1}: not CSV ({error}). Split the row, or write "
                "it as .jsonl."
            ) from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.read_metadata(path)
        groups = (about.row_group(number) for number in range(about.num_row_groups))
        _check_size(sum(group.total_byte_size for group in groups), path)
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error}). Write it anew.") from error


READERS = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str) -> list[dict[str, Any]]:
    import datasets

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source!r} is no file here, and no data set could be loaded under that name: {reason}"
        ) from error
    return [dict(row) for row in loaded]
