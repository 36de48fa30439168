"""The house rules of the repository, read from its source: floors, sizes, docstrings, sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unlearn_llm.losses
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unlearn_llm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Who may import whom: a module imports from lower floors or from its own. The lower a module
# stands, the less it needs: losses and optimisers run in anybody's loop without transformers.
FLOORS: dict[int, tuple[str, ...]] = {
    0: ("types", "registry", "resources", "errors", "safe_text", "private"),
    1: (
        "schedule", "objective", "plan",
        "losses", "losses/answers", "losses/distributions", "losses/forget", "losses/hidden",
        "losses/retain", "losses/weighted",
        "optim", "optim/chunked", "optim/codec", "optim/dual", "optim/dual_plus", "optim/noise",
        "optim/storage", "optim/task", "optim/triton_codec", "optim/triton_step", "optim/update",
        "combine", "combine/base", "combine/gradients", "combine/ngdiff", "combine/ofmu",
        "combine/vectors", "combine/weights",
        "masks", "masks/base", "masks/salun", "masks/sfron",
        "vocabulary", "vocabulary_chunks", "synthetic", "synthetic_words", "yaml_text",
        "evaluation", "evaluation/requests", "evaluation/metrics", "evaluation/text_metrics",
        "evaluation/membership", "evaluation/membership_scores", "evaluation/likelihoods",
        "evaluation/roc", "evaluation/texts", "evaluation/aggregates", "evaluation/columns",
        "evaluation/scores", "evaluation/journal", "evaluation/options", "evaluation/records",
        "evaluation/resampling", "evaluation/safety_metrics", "evaluation/statistics",
        "attacks/verdict",
    ),
    2: (
        "dual_setup", "encode", "data_sets", "rows", "dataset", "models", "hidden", "scoring",
        "reference", "progress", "gumbel", "negate", "shared_base", "undisturbed",
        "checkpoints", "folders", "four_bit", "launch", "ledger", "merge", "model_files",
        "evaluation/batching", "evaluation/cache", "evaluation/generator", "evaluation/gradients",
        "evaluation/judges", "evaluation/lm_eval_data", "evaluation/provenance",
        "evaluation/readings", "evaluation/runner", "evaluation/safety_judges", "evaluation/scorer",
        "evaluation/trees", "evaluation/vllm_runner",
    ),
    3: (
        "config", "callbacks", "combining", "masking", "trainer", "finetune", "alternates",
        "preemption", "saving", "engines", "referring", "zero",
        "attacks", "attacks/adapter", "attacks/asking", "attacks/base", "attacks/campaign",
        "attacks/prefix", "attacks/probing", "attacks/quantisation", "attacks/questions",
        "attacks/relearning", "attacks/sampling",
        "evaluation/strict", "evaluation/suite", "evaluation/samples", "evaluation/evaluate",
        "evaluation/suite_scores", "evaluation/intervals", "evaluation/comparison",
        "evaluation/lm_eval", "evaluation/lm_eval_export",
    ),
    4: (
        "recipe", "recipe_check", "recipe_files", "published", "recipe_rows", "results", "pipeline",
        "evaluating", "comparing", "attacking", "cli", "cli_attack", "cli_merge", "cli_reports",
        "cli_tasks", "merging",
        "cli_env", "cli_faults", "environment",
        "demo", "__init__", "__main__", "evaluation/report",
        "evaluation/during", "evaluation/figure", "evaluation/roc_figure",
        "evaluation/trade_off",
        "continuing", "cli_requests",
        "exchange", "exchange/commands", "exchange/losses", "exchange/model_index",
        "exchange/open_unlearning", "exchange/tofu_csv",
        "release", "release/card", "release/change", "release/folder", "release/scan",
        "leaderboard", "leaderboard/boards", "leaderboard/cells", "leaderboard/comparable",
        "leaderboard/formats", "leaderboard/methods", "leaderboard/published", "leaderboard/runs",
    ),
}  # fmt: skip
LIBRARIES: dict[int, tuple[str, ...]] = {  # what a floor may use beyond the floors below it
    0: ("torch",),
    1: ("numpy", "scipy", "rouge_score", "yaml", "triton"),
    2: (
        "transformers", "datasets", "peft", "accelerate", "tokenizers", "tqdm", "pyarrow",
        "safetensors", "sentence_transformers", "vllm", "bitsandbytes", "sklearn",
    ),
    3: ("pydantic", "lm_eval"),
    4: ("typer", "rich", "huggingface_hub", "matplotlib"),
}  # fmt: skip
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

# Folders of one machine, which mean nothing on another; written so as not to find themselves.
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "root", "home", "Users")]


def name_of(file: Path) -> str:
    """A module as FLOORS names it: "losses/forget"; a package by its folder."""
    name = file.relative_to(PACKAGE).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


def libraries_up_to(floor: int) -> list[str]:
    return [library for level in range(floor + 1) for library in LIBRARIES[level]]


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, as "package.module"."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            for alias in node.names:
                part = PACKAGE.parent.joinpath(*str(node.module).split("."), alias.name)
                is_module = part.is_dir() or part.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


def faults_of_floors(file: Path) -> Iterator[str]:
    name = name_of(file)
    floor, shown = FLOOR_OF[name], file.relative_to(PACKAGE).as_posix()
    for module in imports(file):
        top, *rest = module.split(".")
        if top == PACKAGE.name:
            other = "/".join(rest) or "__init__"
            if FLOOR_OF.get(other, 0) > floor:
                yield (
                    f"{shown} (floor {floor}) imports {other} (floor {FLOOR_OF[other]}); a module "
                    "imports from lower floors or its own"
                )
        elif top not in sys.stdlib_module_names and top not in libraries_up_to(floor):
            allowed = ", ".join(libraries_up_to(floor))
            yield f"{shown} (floor {floor}) imports {top}; floor {floor} may use {allowed} only"


def test_every_module_has_a_floor():
    unknown = sorted({name_of(file) for file in FILES} - FLOOR_OF.keys())
    assert not unknown, (
        f"{', '.join(unknown)}: no floor. Add the module to FLOORS in tests/test_repository.py, on "
        "the lowest floor whose imports it needs (README, 'Floors')."
    )


def test_every_floor_names_modules_that_exist():
    gone = sorted(FLOOR_OF.keys() - {name_of(file) for file in FILES})
    assert not gone, f"FLOORS names modules that do not exist: {', '.join(gone)}. Remove them."


def test_no_module_stands_on_two_floors():
    assert len(FLOOR_OF) == sum(len(names) for names in FLOORS.values())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_from_its_own_floor_or_lower(file):
    if name_of(file) not in FLOOR_OF:
        pytest.skip("has no floor; see test_every_module_has_a_floor")
    faults = sorted(set(faults_of_floors(file)))
    assert not faults, "\n".join(faults)


def test_a_loss_that_imports_transformers_is_found(tmp_path, monkeypatch):
    file = tmp_path / "losses" / "forget.py"
    file.parent.mkdir()
    file.write_text("def f():\n    from transformers import Trainer\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert list(faults_of_floors(file)) == [
        "losses/forget.py (floor 1) imports transformers; floor 1 may use torch, numpy, scipy, "
        "rouge_score, yaml, triton only"
    ]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("unlearn_llm", ["torch", "transformers"]),
        ("unlearn_llm.losses", ["transformers", "datasets", "peft", "accelerate"]),
        ("unlearn_llm.optim", ["transformers", "datasets", "peft", "accelerate"]),
        ("unlearn_llm.evaluation.aggregates", ["transformers", "datasets"]),
    ],
)
def test_a_low_module_is_imported_without_the_libraries_of_higher_floors(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_is_short_enough_to_be_read(file):
    n_lines = len(file.read_text(encoding="utf-8").splitlines())
    assert n_lines < MAX_LINES, f"{n_lines} lines: split it by reason of change"


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public names without a docstring: the module, its functions and classes, their methods."""
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        yield from _undocumented(node, "")


def _undocumented(node: ast.AST, prefix: str) -> Iterator[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
    if node.name.startswith("_") or overload:
        return
    if not ast.get_docstring(node):
        yield prefix + node.name
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from _undocumented(inner, f"{prefix}{node.name}.")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_public_name_has_a_docstring(file):
    missing = list(undocumented(ast.parse(file.read_text(encoding="utf-8"))))
    assert not missing, f"no docstring: {', '.join(missing)}"


def decorated_losses() -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Module, role and function of every loss: a public function of the losses folder."""
    for module in unlearn_llm.losses.__all__:
        tree = ast.parse((PACKAGE / "losses" / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                decorators = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
                (role,) = [d.id.removesuffix("_loss") for d in decorators if hasattr(d, "id")]
                yield module, role, node


LOSSES = list(decorated_losses())


def test_every_registered_loss_is_a_function_of_the_losses_folder():
    modules = {file.stem for file in (PACKAGE / "losses").glob("*.py")} - {"__init__"}
    assert set(unlearn_llm.losses.__all__) == modules
    named = {role: {node.name for _, kind, node in LOSSES if kind == role} for _, role, _ in LOSSES}
    assert named == {"forget": set(FORGET_LOSSES), "retain": set(RETAIN_LOSSES)}


@pytest.mark.parametrize(("module", "role", "node"), LOSSES, ids=[n.name for _, _, n in LOSSES])
def test_every_loss_cites_its_source_and_what_differs(module, role, node):
    text = ast.get_docstring(node) or ""
    for word in ("Source:", "Differs:"):
        assert word in text, f"losses/{module}.py {node.name}: say '{word}'"
    assert text.index("Source:") < text.index("Differs:")


def text_files() -> Iterator[Path]:
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".cfg", ""}
    for folder in ("unlearn_llm", "tests", "recipes", "eval", "docker", "benchmarks"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in suffixes and "__pycache__" not in file.parts:
                yield file
    yield from (file for file in ROOT.glob("*") if file.is_file() and file.suffix in suffixes)


def test_no_file_names_a_folder_of_one_machine():
    found = [
        f"{file.relative_to(ROOT)}, line {number}: {line.strip()}"
        for file in text_files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if any(path in line for path in MACHINE_PATHS)
    ]
    assert not found, "\n".join(found)
