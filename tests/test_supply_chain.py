"""What demo, image and CI install: pinned, with hashes, and enough for what pyproject.toml asks."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("demo", "ci", "cuda")
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?: ; [^\\]+)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def pins(name: str) -> dict[str, Version]:
    """The versions of a lock; every line must be a pin, a hash or the heading."""
    lines = (ROOT / "docker" / "locks" / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    found: dict[str, Version] = {}
    hashes = 0
    for line in lines[1:]:
        if match := PIN.match(line):
            assert not found or hashes, f"{name}.lock: no hash before {line!r}"
            package = canonicalize_name(match[1])
            assert package not in found, f"{name}.lock: {package} stands twice"
            found[package], hashes = Version(match[2]), 0
        else:
            assert HASH.match(line), f"{name}.lock: {line!r}"
            hashes += 1
    assert hashes
    return found


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def asked_for(*, everything: bool) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    texts = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    if everything:
        texts += project["project"]["optional-dependencies"]["judges"]
        texts += project["dependency-groups"]["dev"]
    return [Requirement(text) for text in texts if not text.startswith("torch")]


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_is_a_tested_version_with_hashes(name):
    tested = constraints()
    for package, version in pins(name).items():
        assert tested.get(package, version) == version, f"{package}: run `make lock`"


@pytest.mark.parametrize(("name", "everything"), [("demo", False), ("ci", True)])
def test_a_lock_has_all_that_the_project_asks_for(name, everything):
    pinned = pins(name)
    for requirement in asked_for(everything=everything):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {name}.lock: run `make lock`"
        assert version in requirement.specifier


def test_torch_is_pinned_by_hash_where_its_build_is_known():
    assert pins("cuda")["torch"] == constraints()["torch"]
    for name in ("demo", "ci"):  # its build depends on the machine
        assert "torch" not in pins(name)


def test_the_checks_run_on_what_the_image_has():
    demo, ci = pins("demo"), pins("ci")
    assert demo.items() <= ci.items()
    assert not demo.keys() & pins("cuda").keys()


# The image. Building it takes Docker and a network: `make image`.


def stages() -> dict[str, list[str]]:
    """Instructions of each stage, continued lines joined, from its FROM on."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        if found:
            found[list(found)[-1]].append(line)
    return found


def test_every_stage_comes_from_the_pinned_base_or_from_another_stage():
    known = ["${BASE}"]
    for name, (start, *_) in stages().items():
        assert start.split()[1] in known, start
        known.append(name)
    assert {"cpu", "cuda", "smoke"} <= stages().keys()


def test_everything_is_installed_by_hash_but_torch_for_cpus():
    installs = [line for lines in stages().values() for line in lines if "pip install" in line]
    assert len(installs) == 5
    for line in installs:
        assert "--no-deps" in line
        local = re.search(r"--no-build-isolation \.( |$)", line)
        assert "--require-hashes" in line or "TORCH_CPU" in line or local, line
    (torch,) = re.findall(r"^ARG TORCH_CPU=torch==(\S+)", DOCKERFILE, flags=re.M)
    assert Version(torch) == constraints()["torch"]


@pytest.mark.parametrize("name", ["cpu", "cuda", "smoke"])
def test_what_runs_is_not_root(name):
    lines = stages()
    users = []
    while name in lines:
        users = [line.split()[1] for line in lines[name] if line.startswith("USER ")] + users
        name = lines[name][0].split()[1]
    assert users
    assert users[-1] not in ("root", "0")


def test_the_smoke_test_is_the_demo():
    assert any(line.startswith("RUN") and "unlearn demo" in line for line in stages()["smoke"])


def test_what_the_image_needs_is_let_in_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    for name in ("pyproject.toml", "README.md", "LICENSE", "unlearn_llm", "recipes", "eval"):
        assert name in let_in  # what the wheel is built of
    for line in (line for lines in stages().values() for line in lines):
        if line.startswith("COPY docker/locks"):
            assert any(fnmatch(line.split()[1], rule) for rule in let_in)
    for name in (".git", "outputs", "tests"):
        assert not any(fnmatch(name, rule) for rule in let_in)
    for rule in let_in:
        assert list(ROOT.glob(rule)), f".dockerignore lets in {rule}, which does not exist"
