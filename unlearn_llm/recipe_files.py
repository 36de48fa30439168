"""Recipe files: names, variants, overrides. What the keys mean is in recipe.py.

A file holds one recipe, or a matrix of them: `variants:` names axes, each value of an axis is a
small mapping that is merged into the rest of the file, in the order of the axes.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn_llm.errors import RecipeError
from unlearn_llm.registry import did_you_mean
from unlearn_llm.resources import RECIPES
from unlearn_llm.yaml_text import parse_yaml

Document = dict[str, Any]
Axes = dict[str, dict[str, Any]]


def read_document(path: Path) -> Document:
    """Read a recipe file.

    Raises:
        RecipeError: it is missing, unreadable or no mapping.
    """
    where = display(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(
            f"{where}: cannot be read ({error.strerror}); give another file, or change that."
        ) from error
    document = parse_yaml(text, where)
    if not isinstance(document, dict):
        raise RecipeError(f"{where}: expected sections such as model: and data:, got no mapping.")
    return document


def display(path: Path) -> str:
    """Name a recipe file as a user would: ours from the folder `recipes` on."""
    if path.is_relative_to(RECIPES):
        return f"recipes/{path.relative_to(RECIPES).as_posix()}"
    return str(path)


def names() -> list[str]:
    """Name every recipe of the package, each variant by itself."""
    found = []
    for path in _ours():
        for chosen in variants(read_document(path), display(path)):
            found.append("/".join([name_of(path), *chosen.values()]))
    return found


def _ours() -> list[Path]:
    """The files with recipes; `accelerate` holds settings of its launcher."""
    return [
        path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent != RECIPES / "accelerate"
    ]


def summary() -> list[str]:
    """Name every recipe file, with its axes: "tofu/phi-1.5/{split}/{objective}/{scheme} (48)"."""
    lines = []
    for path in _ours():
        document = read_document(path)
        axes = _axes(document, display(path))
        count = sum(1 for _ in variants(document, display(path)))
        lines.append("/".join([name_of(path), *(f"{{{'|'.join(v)}}}" for v in axes.values())]))
        lines[-1] += f" ({count})" if axes else ""
    return lines


def name_of(path: Path) -> str:
    """Name the recipe in a file: its place among ours, or the file's own name."""
    inside = path.relative_to(RECIPES).as_posix() if path.is_relative_to(RECIPES) else path.name
    return inside.removesuffix(".yaml").removesuffix(".yml")


def locate(name: str) -> tuple[Path, list[str]]:
    """Split "tofu/phi-1.5/forget05/idk+gd/joint" into a file and the values of its axes.

    A path to a file comes before a name of ours; values may follow it in the same way.

    Raises:
        RecipeError: no such recipe, with the nearest name.
    """
    parts = name.split("/")
    for cut in range(len(parts), 0, -1):
        head = "/".join(parts[:cut])
        if head.endswith((".yaml", ".yml")) and Path(head).is_file():
            return Path(head), parts[cut:]
        ours = RECIPES / f"{head}.yaml"
        if ours.is_file() and ours.resolve().is_relative_to(RECIPES.resolve()):
            return ours, parts[cut:]
    near = did_you_mean(name, names())
    raise RecipeError(
        f"There is no recipe {name!r}.{near} Give a .yaml file or a name from `unlearn list`."
    )


def variants(document: Document, where: str) -> Iterator[dict[str, str]]:
    """Give every choice of one value per axis; one empty choice if there are no axes."""
    axes = _axes(document, where)
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def resolve(document: Document, chosen: Sequence[str], name: str, where: str) -> Document:
    """Make the single recipe that the chosen axis values stand for, with its published rows.

    Raises:
        RecipeError: too few, too many or unknown values.
    """
    axes = _axes(document, where)
    if len(chosen) != len(axes):
        example = "/".join([name, *(next(iter(values)) for values in axes.values())])
        raise RecipeError(
            f"{where}: holds no variants, so nothing may follow its name; got {'/'.join(chosen)!r}."
            if not axes
            else f"{where}: expected one value each of {_listed(axes)}, such as {example}; "
            f"got {'/'.join(chosen) or 'none'}."
        )
    single = {key: copy.deepcopy(v) for key, v in document.items() if key != "variants"}
    for (axis, values), value in zip(axes.items(), chosen, strict=True):
        if value not in values:
            raise RecipeError(
                f"{where}: unknown {axis} {value!r}.{did_you_mean(value, values)} "
                f"Known: {', '.join(values)}."
            )
        merge(single, values[value])
    if axes:
        tables = single.pop("published", None) or []
        single["published"] = _pick(tables, dict(zip(axes, chosen, strict=True)), where)
    return {**single, "name": "/".join([single.get("name", name), *chosen])}


def merge(target: Document, changes: Mapping[str, Any]) -> None:
    """Put changes into a document: mappings are merged, everything else is replaced."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)


def override(document: Document, overrides: Sequence[str]) -> list[str]:
    """Apply "train.seed=2"; values are YAML.

    Returns:
        The keys that were set.

    Raises:
        RecipeError: no equals sign, or a key below something that is no mapping.
    """
    keys = []
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise RecipeError(
                f"command line: expected key=value such as train.seed=2, got {text!r}."
            )
        section = document
        for depth, part in enumerate(parts[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
            if not isinstance(section[part], dict):
                above = ".".join(parts[:depth])
                raise RecipeError(f"command line: {key}: {above} holds no keys of its own.")
            section = section[part]
        section[parts[-1]] = parse_yaml(value, f"command line: {key}")
        keys.append(key)
    return keys


def _axes(document: Document, where: str) -> Axes:
    axes = document.get("variants", {})
    good = isinstance(axes, dict) and all(
        isinstance(values, dict) and values and all(isinstance(v, dict) for v in values.values())
        for values in axes.values()
    )
    if not good:
        raise RecipeError(
            f"{where}: variants: expected axes of named values, each a mapping of changes, such as "
            "scheme: {joint: {train: {schedule: joint}}}."
        )
    return axes


def _listed(axes: Axes) -> str:
    return ", ".join(f"{axis} ({' | '.join(values)})" for axis, values in axes.items())


def _pick(tables: Any, chosen: dict[str, str], where: str) -> list[Document]:
    """Take the rows of published tables that belong to the chosen values.

    A table is {source, of: {axis: value}, columns: [axis..., score...], rows}; other keys
    (tolerance, scale, settings) go along with every row.
    """
    found = []
    for table in tables:
        try:
            common = {k: v for k, v in table.items() if k not in ("of", "columns", "rows")}
            for row in table["rows"]:
                cells = {**table["of"], **dict(zip(table["columns"], row, strict=True))}
                values = {axis: cells.pop(axis) for axis in chosen}
                if values == chosen:
                    found.append({**common, "scores": cells})
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise RecipeError(
                f"{where}: published: expected tables of source, of, columns and rows, with every "
                f"axis ({', '.join(chosen)}) in of or columns: {error}."
            ) from error
    return found
