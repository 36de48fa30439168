"""Tables of hand-written results folders, and what stands in them."""

from pathlib import Path

from unlearn_llm.leaderboard.boards import Board, Line, make_boards
from unlearn_llm.leaderboard.published import published_rows
from unlearn_llm.leaderboard.runs import find_runs

AGGREGATE = {"UFE": "ufe", "TFE": "tfe", "MU18": "mu18", "OVR": "ovr"}
SUITE = {
    "name": "tofu",
    "split": "forget10",
    "folder": None,
    "limit": 300,
    "row_order": "closer_look",
    "objective_kind": "targeted",
    "max_new_tokens": 256,
    "max_total_tokens": 256,
    "judges": {"similarity": "paraphrase-MiniLM-L6-v2"},
    "proxies": False,
    "probes": {"forget": {"source": "tofu/{split}_perturbed", "columns": {}, "limit": None}},
    "scores": {"UFE": {"aggregate": "ufe", "options": {}}},
}
MODEL = {
    "name": "target",
    "type": "phi",
    "parameters": 1000,
    "dtype": "bfloat16",
    "template": "phi_dualoptim",
    "max_length": 500,
}


def boards_of(folder: Path, *only: str, published: bool = False, scores=()) -> list[Board]:
    runs, _ = find_runs([folder], only)
    made, _ = make_boards(runs, published_rows() if published else [], scores)
    return made


def lines_of(board: Board) -> dict[str, Line]:
    return {
        f"{line.objective} {line.method} {line.source}".strip(): line
        for block in board.blocks
        for line in block
    }


def texts(line: Line) -> dict[str, str]:
    return {f"{c.split} {c.score}": cell.text for c, cell in line.cells.items()}
