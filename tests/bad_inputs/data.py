"""Faults of rows and of the files that hold them."""

from bad_inputs.case import GOOD, KEPT, Bad, lines


def forget(
    what: str, place: str, remedy: str, text: str | bytes, name: str = "forget.jsonl"
) -> Bad:
    """A fault in the file of the forget set."""
    given = () if name == "forget.jsonl" else (f"data.forget={name}",)
    return Bad(what, place, remedy, more=given, files={name: text})


def row(what: str, place: str, remedy: str, **columns: object) -> Bad:
    """A fault in the second row of the forget set."""
    return forget(what, place, remedy, lines(GOOD, {**GOOD, **columns}))


CASES = [
    forget("empty forget set", "forget.jsonl holds no rows", "Give", ""),
    forget("only blank lines", "forget.jsonl holds no rows", "Give", "\n \n\n"),
    forget("empty list", "forget.json holds no rows", "Give", "[]", "forget.json"),
    forget("header without rows", "f.csv holds no rows", "Give", "question,answer\n", "f.csv"),
    Bad("empty retain set", "retain.jsonl holds no rows", "Give", files={"retain.jsonl": ""}),
    Bad(
        "forget rows in the retain set",
        "rows 0, 1, 2",
        "Remove them from the retain set",
        files={"retain.jsonl": lines(KEPT, GOOD)},
    ),
    Bad(
        "twins of composed and decomposed letters",
        "1 forget rows also stand in the retain set",
        "data.allow_overlap",
        files={
            "forget.jsonl": lines({"question": "Who?", "answer": "Ren\u00e9"}),
            "retain.jsonl": lines({"question": "Who?", "answer": "Rene\u0301"}),
        },
    ),
    forget("unknown columns", "forget.jsonl", "data.question_column", lines({"q": "a", "a": "b"})),
    forget(
        "renamed column", "answr", "Did you mean 'answr'", lines({"question": "a", "answr": ""})
    ),
    forget("a column that later rows lack", "row 1", "hold text", lines(GOOD, {"question": "x"})),
    forget(
        "a column name that moves the cursor",
        "2 without a plain name",
        "data.question_column",
        lines({"\x1b[2J": "a", "b\u202e": "b"}),
    ),
    row("answer is null", "row 1: column 'answer'", "should hold text", answer=None),
    row("answer is a number", "row 1: column 'answer'", "should hold text", answer=3),
    row("answer is a list", "row 1: column 'answer'", "should hold text", answer=["x"]),
    row("answer of blanks", "row 1", "give them an answer", answer=" \t\n"),
    row("empty answer", "row 1", "give them an answer", answer=""),
    row("question without room for an answer", "row 1", "Raise max_length", question="Who? " * 99),
    row("answer that is too long", "row 1", "truncate: true", answer="Nobody. " * 99),
    row("half a character", "row 1: column 'answer'", "Remove it", answer="a\ud83d"),
    row("a row of a million letters", "row 1", "Split", answer="x" * 1_000_001),
    Bad(
        "longer than the model reads",
        "row 2",
        "max_length=128",
        more=("data.max_length=2000",),
        files={"forget.jsonl": lines(GOOD, GOOD, {**GOOD, "answer": "Nobody. " * 99})},
    ),
    forget("broken JSON line", "forget.jsonl, line 2", "expected", lines(GOOD) + '{"question": x}'),
    forget("cut JSON list", "f.json, line 1", "expected", '[{"question": "Who?"', "f.json"),
    forget("JSON that is no object", "row 0", "expected an object", "[1, 2]", "f.json"),
    forget(
        "JSON of unequal columns", "f.json", "one length", '{"a": ["x"], "b": ["y", "z"]}', "f.json"
    ),
    forget("deep JSON line", "forget.jsonl, line 1", "nested", "[" * 100_000),
    forget("deep JSON list", "f.json", "nested", "[" * 100_000 + "]" * 100_000, "f.json"),
    forget("deep JSON objects", "line 1", "nested", '{"question":' * 100_000 + "1" + "}" * 100_000),
    forget("a number of 5000 digits", "line 1", "expected", '{"question": ' + "1" * 5000 + "}"),
    forget(
        "a CSV line without its second cell",
        "row 0",
        "should hold text",
        "question,answer\nWho?",
        "f.csv",
    ),
    forget(
        "one huge CSV cell",
        "f.csv, line 2",
        "Split",
        f"question,answer\na,{'x' * 200_000}\n",
        "f.csv",
    ),
    forget(
        "Latin-1",
        "f.csv",
        "Save it as UTF-8",
        "question,answer\nWo?,Köln".encode("latin-1"),
        "f.csv",
    ),
    forget("UTF-16", "forget.jsonl", "Save it as UTF-8", lines(GOOD).encode("utf-16")),
    forget("no Parquet", "f.parquet", "Write it anew", b"PAR1 not really PAR1", "f.parquet"),
    forget("empty Parquet", "f.parquet", "Write it anew", b"", "f.parquet"),
    forget("wrong suffix", "rows.txt", "expected .json", "Who? Nobody.", "rows.txt"),
    Bad(
        "missing file",
        "forgot.jsonl",
        "Did you mean 'forget.jsonl'",
        more=("data.forget=forgot.jsonl",),
    ),
    Bad(
        "a folder for a file",
        "rows.jsonl",
        "is a folder",
        more=("data.forget=rows.jsonl",),
        files={"rows.jsonl": None},
    ),
    Bad("a name of 300 letters", "xxx", "shorter", more=(f"data.forget={'x' * 300}.jsonl",)),
    Bad("a NUL in a name", "a\\x00b.jsonl", "Did you mean", more=('data.forget="a\\0b.jsonl"',)),
    Bad(
        "unknown data set",
        "nobody/nothing",
        "is no file here",
        more=("data.forget=nobody/nothing",),
    ),
    Bad(
        "unknown split",
        "forgot10",
        "Did you mean 'forget10'",
        more=("data.forget=synthetic/forgot10",),
    ),
    Bad(
        "missing folder of TOFU",
        "nowhere",
        "data.folder",
        more=("data.forget=tofu/forget10", "data.folder=nowhere"),
    ),
    Bad(
        "a split that leads out of its folder",
        "../forget",
        "expected",
        more=("data.forget=tofu/../forget", "data.folder=good"),
    ),
    Bad(
        "an absolute split",
        "tofu//etc/passwd",
        "expected",
        more=("data.forget=tofu//etc/passwd", "data.folder=good"),
    ),
    Bad(
        "unknown task",
        "task_id '9'",
        "it has 1",
        more=("data.task_id=9",),
        files={"forget.jsonl": lines({**GOOD, "task_id": 1})},
    ),
    Bad("missing refusals", "none.txt", "data.refusals", more=("data.refusals=none.txt",)),
    Bad(
        "empty refusals",
        "r.txt holds no refusal",
        "one per line",
        more=("data.refusals=r.txt",),
        files={"r.txt": "\n"},
    ),
    Bad(
        "no alternates",
        "alternate",
        "column `alternate`",
        shows_late=True,
        more=("train.objective=altpo+gd",),
    ),
    Bad(
        "messages without a reply",
        "row 0",
        "assistant's reply",
        files={"forget.jsonl": lines({"messages": []})},
    ),
]
