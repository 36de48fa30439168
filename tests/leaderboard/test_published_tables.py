"""What papers print, against the talk's own text and its formulas."""

import re
from collections import Counter
from pathlib import Path

import pytest

from unlearn_llm.errors import RecipeError
from unlearn_llm.evaluation.aggregates import AGGREGATES
from unlearn_llm.leaderboard import published
from unlearn_llm.leaderboard.boards import Board, Column, Line, published_boards
from unlearn_llm.leaderboard.cells import direction
from unlearn_llm.leaderboard.published import PublishedRow, published_rows

METHODS = {
    "Initial": "initial",
    "Joint": "joint",
    "Alternate": "alternate",
    "DO": "dual_adamw",
    "DO 8bit": "dual_adamw 8bit",
    "DO+": "dual_adamw_plus",
    "DO+ 8bit": "dual_adamw_plus 8bit",
}
SPLITS = ("forget01", "forget05", "forget10")
TOFU_TABLES = {
    "phi-1.5": ("Experiments: TOFU", "Figure: Results on TOFU with Phi-1.5"),
    "llama-2-7b": ("Figure: Results on TOFU with Phi-1.5", "Figure: Results on TOFU with Llama 2"),
}
# Where the talk's underlines are not the second best of its own numbers: 47.53 of 48.14, 47.69 and
# 47.53; 71.97 and 71.84 of 72.06, 71.97 and 71.84; none under 49.96, second to 50.32...
MARKED_OTHERWISE = {
    "phi-1.5": {
        ("idk+gd", "forget01", "MU18"),
        ("me+gd", "forget05", "UFE"),
        ("me+gd", "forget05", "MU18"),
        ("me+gd", "forget05", "OVR"),
        ("me+gd", "forget10", "MU18"),
    },
    "llama-2-7b": set(),
}


@pytest.fixture(scope="module")
def rows() -> list[PublishedRow]:
    return published_rows()


@pytest.fixture(scope="module")
def boards(rows) -> dict[tuple[str, str, str], Board]:
    made = published_boards(rows)
    return {(board.blocks[-1][0].source, board.suite, board.model): board for board in made}


def talk(shared: Path, start: str, end: str) -> str:
    text = (shared / "seeds" / "talk-multi-objective-unlearning.txt").read_text(encoding="utf-8")
    begun = text.index(start)
    return text[begun : text.index(end, begun + 1)]


def cells_of(line: str) -> list[str]:
    return [cell for cell in line.split("\t")]


def line_of(board: Board, objective: str, method: str) -> Line:
    (found,) = [
        line
        for block in board.blocks
        for line in block
        if (line.objective, line.method) == (objective, method)
    ]
    return found


def test_no_row_stands_twice(rows):
    # A paper may print a baseline twice, and so may two papers: then the scores are others.
    keys = Counter(
        (row.paper, row.suite, row.model, row.split, row.objective, row.method, tuple(row.scores))
        for row in rows
    )
    assert [key for key, count in keys.items() if count > 1] == []
    assert len(rows) > 200


@pytest.mark.parametrize("model", TOFU_TABLES)
def test_the_tofu_tables_are_the_talks_with_its_marks(shared, boards, model):
    board = boards["DualOptim+", "tofu", model]
    objective, seen, otherwise = "", 0, set()
    for line in talk(shared, *TOFU_TABLES[model]).splitlines():
        loss, *cells = line.split("\t")
        objective = loss.lower() if "+" in loss else objective
        if len(cells) != 13 or cells[0] not in METHODS:
            continue
        ours = line_of(board, objective, METHODS[cells[0]])
        places = [(split, name) for split in SPLITS for name in ("UFE", "TFE", "MU18", "OVR")]
        for (split, name), printed in zip(places, cells[1:], strict=True):
            cell = ours.cells.get(Column(split, name))
            if printed == "–":
                assert cell is None or cell.text == "–"
                continue
            assert cell is not None
            assert cell.text == re.sub("</?u>", "", printed)
            seen += 1
            if (cell.rank == 2) != ("<u>" in printed):
                otherwise.add((objective, split, name))
    assert seen == 6 * 3 * 4 + 6 * 3 * 3
    assert otherwise == MARKED_OTHERWISE[model]


def one_row(ufe: float, tfe: float, utility: float, members: tuple[str, ...]) -> dict:
    """Columns of one row whose UFE, TFE and MU are the given ones, by hand."""
    leak = 1 - ufe
    texts = {"rouge": leak, "probability": leak, "similarity": leak}
    forget = {**texts, "entailment_from_generation": leak, "truth_ratio": ufe}
    forget |= {"token_entropy": tfe, "refusal_entailment": tfe}
    names = ("rouge", "probability", "probability_normalised", "token_entropy", "similarity")
    kept = dict.fromkeys((*names, "entailment", "entailment_from_generation"), utility)
    kept["truth_ratio"] = 1 - utility
    columns = {probe: {name: [value] for name, value in kept.items()} for probe in members}
    return columns | {"forget": {name: [value] for name, value in forget.items()}}


def test_the_talks_ovr_is_our_aggregate_of_its_parts(rows):
    checked, off = 0, []
    for row in rows:
        scores = {name: value / 100 for name, value in row.scores.items()}
        utility = next((name for name in ("MU18", "MU6") if name in scores), None)
        if "OVR" not in scores or utility is None:
            continue
        columns = one_row(
            scores["UFE"],
            scores.get("TFE", 0.5),
            scores[utility],
            ("retain", "real_authors", "world_facts"),
        )
        kind = "targeted" if "TFE" in scores else "untargeted"
        found = AGGREGATES["ovr"](columns, kind=kind, utility=utility.lower())
        assert found.value is not None
        checked += 1
        if abs(100 * found.value - row.scores["OVR"]) > 0.0126:
            off.append((row.model, row.split, row.objective, row.method, found.value))
    assert checked == 72 + 13
    # The one cell that the talk prints otherwise: 74.42, its parts give 74.46.
    assert [cell[:4] for cell in off] == [
        ("llama-2-7b", "forget05", "idk+gd", "dual_adamw_plus 8bit")
    ]
    assert off[0][4] == pytest.approx(0.744625)


def test_averages_are_the_means_of_their_columns(rows):
    downstream = ("ARC-c", "MMLU", "TruthfulQA", "TriviaQA", "GSM8K")
    safety = ("I-Malicious", "I-CoNa", "I-Controversial", "Q-Harm")
    for row in rows:
        s = row.scores
        if row.suite == "downstream":
            assert s["AVG"] == pytest.approx(sum(s[name] for name in downstream) / 5, abs=0.0101)
        if row.suite == "safety":
            assert s["safety AVG"] == pytest.approx(sum(s[n] for n in safety) / 4, abs=0.0101)
            # Its note says so: the paper prints 32.81 for DualOptim+.
            expected = 32.21 if row.method == "dual_adamw_plus" else s["utility AVG"]
            assert sum(s[n] for n in downstream) / 5 == pytest.approx(expected, abs=0.0101)
        if "Avg" in s:
            assert s["Avg"] == pytest.approx((s["MU18"] + s["UFE"]) / 2, abs=1.01e-4)


@pytest.mark.parametrize(
    ("suite", "model", "start", "end", "width"),
    [
        ("real_persons", "llama-3-8b", "Experiments: Real Data", "Figure: Results on real", 4),
        ("downstream", "llama-3-8b", "Experiments: Real Data", "Figure: Results on real", 6),
        ("safety", "alpaca-llama-3-8b", "Experiments: Safety", "Figure: Performance comp", 13),
    ],
)
def test_real_persons_downstream_and_safety_are_the_talks(
    shared, boards, suite, model, start, end, width
):
    board = boards["DualOptim+", suite, model]
    objective, seen = "", 0
    for line in talk(shared, start, end).splitlines():
        cells = line.split("\t")
        objective = cells[0].lower() if "+GD" in cells[0] else objective
        if suite != "safety":
            cells = cells[1:]
        if len(cells) < 11 or cells[0] not in METHODS:
            continue
        method = METHODS[cells[0]]
        ours = line_of(board, "" if method == "initial" else objective, method)
        printed = [cell for cell in cells[1:] if cell]
        printed = printed[:4] if suite == "real_persons" else printed[-width:]
        texts = [
            ours.cells[column].text if column in ours.cells else "–" for column in board.columns
        ]
        assert texts == [re.sub("</?u>", "", cell) for cell in printed]
        seen += 1
    assert seen == (7 if suite == "safety" else 13)


def test_every_published_score_of_the_talk_has_a_direction(rows):
    of_talk = {name for row in rows if row.paper.startswith("DualOptim") for name in row.scores}
    assert {name: direction(name) for name in of_talk if direction(name) is None} == {}
    assert direction("XSTest") == "down" and direction("forget_knowmem") == "down"
    assert direction("privleak") == "zero" and direction("a score of mine") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("paper: x\ntables: [{table: t, columns: [split, UFE], rows: [[a]]}]", "expected 2 cells"),
        ("paper: x\ntables: [{table: t, columns: [UFE], rows: [[high]]}]", "expected a number"),
        (
            "paper: x\ntables: [{table: t, columns: [UFE], rows: [], scael: 1}]",
            "Did you mean 'scale'?",
        ),
        ("tables: []", "paper is missing"),
    ],
)
def test_a_mistake_in_a_table_names_file_and_cell(tmp_path, monkeypatch, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    with pytest.raises(RecipeError) as refused:
        published_rows()
    assert "eval/published/mine.yaml" in str(refused.value)
    assert words in str(refused.value)
