"""Where the data folders `recipes/` and `eval/` lie: inside the wheel, or in the checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
ROOT = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent
RECIPES = ROOT / "recipes"
EVAL = ROOT / "eval"
