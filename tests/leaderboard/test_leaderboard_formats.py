"""The same tables as Markdown, LaTeX, CSV, and from the command line."""

import csv
import io
import re

import pytest
from finished_runs import boards_of
from rich.console import Console

from unlearn_llm import cli
from unlearn_llm.leaderboard import formats
from unlearn_llm.leaderboard.boards import Board


@pytest.fixture
def hostile(run, tmp_path) -> list[Board]:
    """Two methods with a name that no format may take for its own."""
    run("a", {"UFE": 0.5, "forget_quality": 1e-12}, objective="=HYPERLINK(1)|a_b&{%}#$~^\\<i>")
    run(
        "b",
        {"UFE": 0.6, "forget_quality": 1e-3},
        objective="=HYPERLINK(1)|a_b&{%}#$~^\\<i>",
        schedule="joint",
    )
    return boards_of(tmp_path)


def test_markdown_has_an_anchor_marks_and_whole_rows(hostile):
    text = formats.markdown(hostile)
    assert text.startswith('<a id="tofu-tofu-ft-phi-1-5"></a>\n\n### tofu, tofu_ft_phi-1.5\n')
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert widths == {6}
    assert "| **60.00** | **1.0e-03** |" in rows[2] and "| <u>50.00</u> |" in rows[3]
    assert "\\<i\\>" in text and "<i>" not in text


def test_names_cannot_break_a_row_or_move_the_cursor(run, tmp_path):
    run("a", {"UFE": 0.5}, optimizer="dual_adamw\n| x\x1b[31m", path="a/b\x1b[2J")
    made = boards_of(tmp_path)
    for text in (formats.markdown(made), formats.latex(made), formats.as_csv(made)):
        assert "\x1b" not in text and "\n| x" not in text
    console = Console(file=io.StringIO(), force_terminal=False, width=120)
    console.print(formats.for_terminal(made))
    assert "50.00" in console.file.getvalue() and "\x1b" not in console.file.getvalue()


def test_latex_is_balanced_and_escaped(hostile):
    text = formats.latex(hostile)
    body = re.sub(r"^%.*$", "", text, flags=re.M)
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    begun = re.findall(r"\\begin\{(\w+)\}", text)
    assert begun == ["table", "tabular"] == re.findall(r"\\end\{(\w+)\}", text)[::-1]
    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    for row in rows[1:]:
        assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
    assert r"a\_b\&\{\%\}\#\$\textasciitilde{}\textasciicircum{}\textbackslash{}$<$i$>$" in text
    assert r"\textbf{60.00}" in text and r"\underline{50.00}" in text
    assert r"\multicolumn{2}{c}{forget10}" in text and r"\cmidrule(lr){4-5}" in text


def test_csv_is_unscaled_and_no_formula(hostile):
    rows = list(csv.DictReader(io.StringIO(formats.as_csv(hostile))))
    assert all(row["objective"].startswith("'=HYPERLINK") for row in rows)
    best = [row for row in rows if row["rank"] == "1"]
    assert [(row["score"], row["method"]) for row in best] == [
        ("UFE", "joint"),
        ("forget_quality", "joint"),
    ]
    assert float(best[0]["mean"]) == 0.6 and best[0]["better"] == "up"
    assert float(best[1]["median"]) == 1e-3 and best[1]["mean"] == ""


# The command.


@pytest.fixture
def command(capsys, monkeypatch):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["unlearn", "leaderboard", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_command_prints_writes_and_refuses(run, tmp_path, command):
    run("a", {"UFE": 0.5})
    folder = str(tmp_path)
    code, out, err = command(folder, "--no-published")
    assert code == 0 and "| idk+gd | alternate | seed 0 | 50.00 |" in out and err == ""
    for suffix, begins in ((".md", "<a id="), (".csv", "table,suite"), (".tex", "% \\use")):
        file = tmp_path / "made" / f"table{suffix}"
        code, out, _ = command(folder, "--output", str(file))
        assert code == 0 and out == f"wrote {file}\n" and file.read_text().startswith(begins)
    for arguments, words in (
        ((folder, "--format", "html"), "expected markdown, csv, latex, got 'html'"),
        ((folder, "--output", "x.html"), "ending in .md, .csv, .tex"),
        ((folder, "--only", "suite.limit"), "expected key=value"),
        ((folder, "--only", "suite.limit=7"), "None of 1 runs has suite.limit=7"),
        ((folder, "--scores", "UFO"), "Did you mean 'UFE'?"),
        ((str(tmp_path / "none"),), "There is no folder"),
        ((str(tmp_path / "made"),), "No finished run in"),
        (("--scores", "UFE"), "give folders with runs"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err


def test_without_folders_the_papers_tables_are_printed(command):
    code, out, _ = command()
    assert code == 0
    assert "### Published: DualOptim+, safety, alpaca-llama-3-8b" in out
    assert "| dual_adamw_plus 8bit | published |" in out
