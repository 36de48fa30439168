"""The ROC curves of membership attacks as a figure: one panel an attack, one line a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.figure import write_figure
from unlearn_llm.evaluation.records import ROC, SCORES
from unlearn_llm.evaluation.report import labels, read_details
from unlearn_llm.evaluation.trade_off import EVALUATION, check_alike
from unlearn_llm.safe_text import printable

PANEL = 2.6
"""Width and height of a panel, in inches."""
COLUMNS = 3

Curves = Mapping[str, Mapping[str, Sequence[float]]]
"""By attack: "fpr" and "tpr", from (0, 0) to (1, 1)."""


def draw_roc(path: Path, folders: Sequence[Path]) -> None:
    """Draw what `evaluate` left in roc.json of several models that the same rows were asked of.

    Both axes are logarithmic, as arXiv:2112.03570 argues: an attack matters where it names few rows
    wrongly. Beside the name of a model stands the area under its curve (linear, of scores.json).

    Args:
        path: An .svg, .png or .pdf file.
        folders: Runs, or folders that `unlearn eval` wrote.

    Raises:
        UserError: a folder has no curves, two were measured unlike, matplotlib is missing.
    """
    found = {str(folder): _evaluation(folder) for folder in folders}
    names = {key: printable(name) for key, name in labels(list(found)).items()}
    details = {names[key]: read_details(folder) for key, folder in found.items()}
    check_alike(details, of_model=False)
    curves = {names[key]: _curves(folder / ROC) for key, folder in found.items()}
    attacks = list(dict.fromkeys(attack for of_model in curves.values() for attack in of_model))
    columns = min(COLUMNS, len(attacks))
    rows = -(-len(attacks) // columns)

    def fill(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for attack, panel in zip(attacks, panels, strict=False):
            shown = {name: found[attack] for name, found in curves.items() if attack in found}
            _fill_panel(panel, attack, shown, details)
        for empty in panels[len(attacks) :]:
            empty.remove()

    write_figure(path, (PANEL * columns, PANEL * rows), fill)


def _evaluation(folder: Path) -> Path:
    """Find the folder with the curves: the given one, or the evaluation of a run."""
    for place in (folder, folder / EVALUATION):
        if (place / ROC).is_file() and (place / SCORES).is_file():
            return place
    raise UserError(
        f"{folder} holds no {ROC}. A suite with membership attacks writes it: "
        "unlearn eval MODEL --suite privacy."
    )


def _curves(path: Path) -> Curves:
    """Read curves.

    Raises:
        UserError: the file is damaged, or no attack could be measured.
    """
    try:
        curves: Curves = json.loads(path.read_text(encoding="utf-8"))
        whole = all(len(curve["fpr"]) == len(curve["tpr"]) > 1 for curve in curves.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}). Evaluate again.") from error
    if not curves or not whole:
        raise UserError(f"{path} holds no whole curve; no attack was measured. Evaluate again.")
    return curves


def _fill_panel(
    panel: Any, attack: str, curves: Curves, details: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw one attack on all models, and the line of an attacker who guesses."""
    # Below one wrongly or rightly named row there is nothing: the axes begin where curves do.
    sides = [side for curve in curves.values() for side in curve.values()]
    least = min(share for side in sides for share in side if share > 0)
    guess = np.geomspace(least, 1)
    panel.plot(guess, guess, color="grey", linestyle=":", linewidth=1)
    for number, name in enumerate(details):
        if name not in curves:
            continue
        curve = curves[name]
        area = details[name]["scores"][attack]["value"]
        panel.plot(
            np.maximum(curve["fpr"], least),
            np.maximum(curve["tpr"], least),
            linewidth=1.2,
            color=f"C{number}",  # a model's own, in every panel
            label=f"{name}: {area:.3f}",
        )
    panel.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.05))
    panel.set_title(attack, fontsize=8, parse_math=False)
    panel.set_xlabel("holdout rows named", fontsize=7)
    panel.set_ylabel("forget rows named", fontsize=7)
    panel.tick_params(labelsize=6)
    panel.grid(alpha=0.3)
    for text in panel.legend(title="AUC", fontsize=6, title_fontsize=6).get_texts():
        text.set_parse_math(False)
