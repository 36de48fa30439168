#!/usr/bin/env bash
# Pin what demo, image and CI install, with the hashes of every file that the index has of it:
#
#   docker/locks/lock.sh       (make lock; a network, pip and uv; versions are constraints.txt's)
#
# torch is left out: its build depends on the machine, and so do its hashes. cuda.lock has the
# build of the index, for the image with CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
bin="$work/venv/bin"
"$bin/python" -m pip install --quiet "pip>=25.1" uv==0.13.8

# What pip would install, as NAME==VERSION. uv could resolve this too, but not beside a build of
# torch that stands in a folder.
resolve() {
  "$bin/python" -m pip install --quiet --dry-run --ignore-installed -c constraints.txt \
    --report "$work/report.json" torch "${@:2}"
  "$bin/python" - "$work/report.json" >"$work/$1" <<'PY'
import json, sys

with open(sys.argv[1]) as file:
    found = json.load(file)["install"]
linux_only = {"deepspeed", "triton"}
for one in sorted(found, key=lambda one: one["metadata"]["name"].lower()):
    name, version = one["metadata"]["name"], one["metadata"]["version"]
    marker = " ; sys_platform == 'linux'" if name in linux_only else ""
    if name not in ("torch", "unlearn_llm"):
        print(f"{name}=={version}{marker}")
PY
}

# Hashes of all files of each, whatever the platform.
pin() {
  {
    echo "# $2 Made by docker/locks/lock.sh; do not edit."
    "$bin/uv" pip compile --quiet --no-deps --universal --generate-hashes --no-header \
      --no-annotate "$work/$1"
  } >"docker/locks/$1.lock"
}

resolve demo . hatchling editables
resolve ci ".[judges]" --group dev hatchling editables
pin demo "The package and what builds it, without torch."
pin ci "The same, with what tests and checks need."

# The CUDA build of torch with its libraries, but what demo.lock has.
grep -E "^torch==" constraints.txt |
  "$bin/uv" pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    -c constraints.txt --no-header --no-annotate - |
  grep -ivE "^($(sed 's/==.*//; s/_/[-_]/g' "$work/demo" | paste -sd'|'))==" >"$work/cuda"
pin cuda "torch for CUDA, on Linux x86-64, beside demo.lock."
