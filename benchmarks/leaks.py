"""Plants words in a forget set, runs every command on it, and looks for them outside private/.

32 words in the forget set, 8 in the retain set; commands that work, are refused, or crash.

    python benchmarks/leaks.py --folder outputs/leaks [--json] [--only NAME]...

After every command its output, the working folder, HF_HOME, TMPDIR and HOME are looked through, in
all the ways in which leaks_scan.py knows a word to be written. A token for the hub stands in the
environment and is looked for, too; so are pickles outside checkpoints, and files in private/ that
others than their owner may read. Prints {"canaries", "commands", "hits", "runs"}; exits with 1 if
anything was found, or if a command ended otherwise than it should.

Not looked through are private/ itself, and the files of the data that a user hands in.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HOMES = {name: name.lower() for name in ("HF_HOME", "TMPDIR", "HOME", "XDG_CACHE_HOME")}
SECRET = "hf_kQvzLrTwXnBdMpJgYsHcFa"


def main() -> int:
    """Run the commands, look, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a new folder; else one that is removed")
    parser.add_argument("--only", nargs="+", help="commands by name, and those that they need")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
    given = parser.parse_args()
    folder = (given.folder or Path(tempfile.mkdtemp())).resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    surround(folder)
    from leaks_runs import run_all  # which imports libraries that read the environment

    try:
        result = run_all(folder, given.only, SECRET, list(HOMES.values()), quiet=given.json)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    print(json.dumps(result) if given.json else report(result))
    return int(bool(result["hits"]) or any(not run["as_expected"] for run in result["runs"]))


def surround(folder: Path) -> None:
    """Let everything that libraries write on the side go into the folder."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": SECRET}
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    for variable, name in HOMES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder / name)
    tempfile.tempdir = None


def report(result: dict[str, Any]) -> str:
    """Say in words what was found."""
    lines = [
        f"{run['name']}: ended with {run['code']}, expected {run['expected']}"
        for run in result["runs"]
        if not run["as_expected"]
    ]
    lines += [f"{h['command']}: {h['what']} ({h['how']}) in {h['file']}" for h in result["hits"]]
    looked = sum(run["files"] for run in result["runs"])
    return "\n".join(
        [
            *lines,
            f"{result['canaries']} words planted, {result['commands']} commands, {looked} files "
            f"looked through as they changed, {len(result['hits'])} hits.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
