"""Faults of the command line, and of the folders that commands read and write."""

from pathlib import Path

from bad_inputs.case import EVAL, TRAIN, Bad

SCORED = "scored/synthetic/good"


def no_entry(*names: str, mode: int = 0):
    def close(folder: Path) -> None:
        for name in names:
            (folder / name).chmod(mode)

    return close


def moved(name: str, to: str):
    def move(folder: Path) -> None:
        (folder / name).rename(folder / to)

    return move


CASES = [
    Bad("unknown command", "trian", "Did you mean 'train'", "trian mine.yaml"),
    Bad("unknown option", "--overwrit", "--overwrite", "train mine.yaml --overwrit"),
    Bad("no argument", "RECIPE", "unlearn train --help", "train"),
    Bad("an option without its value", "--output", "unlearn --help", "eval good --output"),
    Bad(
        "a word for a number (option)",
        "--limit",
        "unlearn attack --help",
        "attack good --limit many",
    ),
    Bad(
        "a number below the least",
        "--repeats",
        "unlearn generate-alternates --help",
        "generate-alternates mine.yaml a.jsonl --repeats 0",
    ),
    Bad("an override without a value", "train.seed", "key=value", TRAIN, ("train.seed",)),
    Bad(
        "an override below a value",
        "train.max_steps.x",
        "no keys of its own",
        TRAIN,
        ("train.max_steps.x=1",),
    ),
    Bad("an override that is no YAML", "train.seed", "expected", TRAIN, ("train.seed={",)),
    Bad(
        "resume and overwrite",
        "--resume",
        "give one of them",
        "train mine.yaml --resume --overwrite",
    ),
    Bad("results that are there", "out", "--overwrite", "train mine.yaml"),
    Bad(
        "resume where no run is",
        "scored",
        "no run to go on with",
        "train mine.yaml --resume train.output_dir=scored",
    ),
    Bad(
        "overwrite what is no run",
        "scored",
        "nothing is overwritten",
        TRAIN,
        ("train.output_dir=scored",),
    ),
    Bad(
        "resume with another recipe",
        "train.seed",
        "Resume with the same recipe",
        "train mine.yaml --resume train.seed=9",
    ),
    Bad("output over the model", "good", "the same folder", TRAIN, ("train.output_dir=good",)),
    Bad(
        "output around the model",
        "model.path lies in train.output_dir",
        "another folder",
        TRAIN,
        ("model.path=out/inner",),
        prepare=moved("good", "out/inner"),
    ),
    Bad(
        "output is a file",
        "mine.yaml is a file",
        "give a folder",
        TRAIN,
        ("train.output_dir=mine.yaml",),
    ),
    Bad(
        "output below a file", "mine.yaml", "is a file", TRAIN, ("train.output_dir=mine.yaml/out",)
    ),
    Bad("output of 300 letters", "xxx", "shorter", TRAIN, (f"train.output_dir={'x' * 300}",)),
    Bad(
        "output in a folder that may not be written",
        "write in shut",
        "permission",
        "train mine.yaml train.output_dir=shut/out",
        files={"shut": None},
        of_permissions=True,
        prepare=no_entry("shut", mode=0o555),
    ),
    Bad(
        "output that may not be written",
        "out",
        "permission",
        TRAIN,
        of_permissions=True,
        prepare=no_entry("out", mode=0o555),
    ),
    Bad(
        "rows that may not be read",
        "forget.jsonl",
        "permission",
        TRAIN,
        of_permissions=True,
        prepare=no_entry("forget.jsonl"),
    ),
    Bad(
        "a recipe that may not be read",
        "mine.yaml",
        "give another file",
        TRAIN,
        of_permissions=True,
        prepare=no_entry("mine.yaml"),
    ),
    Bad(
        "weights that may not be read",
        "model.safetensors",
        "permission",
        TRAIN,
        of_permissions=True,
        prepare=no_entry("good/model.safetensors"),
    ),
    Bad(
        "a tokenizer that may not be read",
        "good",
        "ermission",
        TRAIN,
        of_permissions=True,
        prepare=no_entry("good/tokenizer.json"),
    ),
    Bad("eval without a model", "eval", "give models", "eval"),
    Bad("eval of nothing that is there", "./nowhere", "there is no folder", "eval ./nowhere"),
    Bad("eval over an evaluation", SCORED, "--overwrite", EVAL.replace(" --overwrite", "")),
    Bad("eval with an unknown suite", "tofoo", "Did you mean 'tofu'", "eval good --suite tofoo"),
    Bad(
        "eval into a file",
        "mine.yaml is a file",
        "give a folder",
        "eval good --suite synthetic limit=1 data.template=plain --output mine.yaml",
    ),
    Bad(
        "eval with a reference that is missing",
        "gone.jsonl",
        "There is no file",
        EVAL,
        ("--reference", "gone.jsonl"),
    ),
    Bad(
        "records that are none", "forget.jsonl, line 1", "not a record", "eval --from forget.jsonl"
    ),
    Bad("records that are missing", "gone.jsonl", "There is no file", "eval --from gone.jsonl"),
    Bad(
        "records nested deeply",
        "deep.jsonl, line 1",
        "not a record",
        "eval --from deep.jsonl",
        files={"deep.jsonl": "[" * 100_000},
    ),
    Bad(
        "records with an output",
        "--from writes nothing",
        "leave --output out",
        "eval --from gone.jsonl --output x",
    ),
    Bad("compare with nothing", "gone", "There is no file", f"compare {SCORED} gone"),
    Bad(
        "compare scores that are none",
        "scores.json",
        "does not hold the scores",
        f"compare {SCORED} {SCORED}",
        files={f"{SCORED}/scores.json": "{"},
    ),
    Bad(
        "scores nested deeply",
        "scores.json",
        "does not hold the scores",
        f"compare {SCORED} {SCORED}",
        files={f"{SCORED}/scores.json": "[" * 100_000},
    ),
    Bad("leaderboard of nothing", "gone", "folder", "leaderboard gone"),
    Bad(
        "leaderboard into an unknown format",
        "table.doc",
        ".md, .csv, .tex",
        "leaderboard --output table.doc",
    ),
    Bad("leaderboard in an unknown format", "doc", "expected markdown", "leaderboard --format doc"),
    Bad("plot of nothing", "good", "eval_strategy", "plot good --output a.svg"),
    Bad(
        "plot into an unknown format",
        "a.doc",
        "expected a file ending in",
        "plot out --output a.doc",
    ),
    Bad(
        "export in an unknown format",
        "csv",
        "Did you mean 'tofu-csv'",
        f"export {SCORED} --format tofu_csv",
    ),
    Bad("export of nothing", "out", "There is no file", "export out --format tofu-csv"),
    Bad("import of nothing", "gone.json", "There is no file", "import gone.json --output new"),
    Bad(
        "import of what is no log",
        "good/config.json",
        "expected",
        "import good/config.json --output new",
    ),
    Bad(
        "import of deep JSON",
        "deep.json",
        "nested",
        "import deep.json --output new",
        files={"deep.json": "[" * 100_000},
    ),
    Bad(
        "import over an evaluation",
        SCORED,
        "--overwrite",
        f"import good/config.json --output {SCORED}",
    ),
    Bad("copy over a file", "mine.yaml exists", "another name", "copy synthetic/unlearn mine.yaml"),
    Bad("copy to what is no recipe", "a.txt", "ends in .yaml", "copy synthetic/unlearn a.txt"),
    Bad("copy below a file", "mine.yaml", "is a file", "copy synthetic/unlearn mine.yaml/a.yaml"),
    Bad(
        "negate without weights",
        "scored holds no .safetensors",
        "Give a local folder",
        "negate good scored new",
    ),
    Bad("negate over a folder", "out exists", "give a new folder", "negate good good out"),
    Bad("negate by an endless factor", "--alpha", "finite", "negate good good new --alpha inf"),
    Bad(
        "alternates over a file",
        "forget.jsonl",
        "expected a new file",
        "generate-alternates mine.yaml forget.jsonl",
    ),
    Bad(
        "export-tasks over a folder",
        "scored",
        "new folder",
        "export-tasks good scored --suite synthetic data.template=plain",
    ),
    Bad("attack of what says not what it forgot", "good", "--forget", "attack good"),
    Bad(
        "attack that is unknown",
        "magic",
        "Known",
        "attack good --forget forget.jsonl --attacks magic",
    ),
    Bad(
        "attack with an unknown option",
        "sampling",
        "Did you mean 'samples'",
        "attack good --forget forget.jsonl sampling.sample=2",
    ),
    Bad(
        "attack on nothing",
        "./nowhere",
        "there is no folder",
        "attack ./nowhere --forget forget.jsonl",
    ),
    Bad(
        "attack into a file",
        "mine.yaml is a file",
        "give a folder",
        "attack good data.template=plain --forget forget.jsonl --attacks plain --output mine.yaml",
    ),
    Bad("demo into a file", "mine.yaml is a file", "give a folder", "demo --output mine.yaml"),
    Bad("a command with escapes in it", "\\x1b[31m", "unlearn --help", "\x1b[31mtrain"),
    Bad(
        "a model with escapes in its name", "\\x1b[31m", "there is no folder", "eval ./\x1b[31m\x07"
    ),
    Bad("a name that is no UTF-8", "\\udcff", "unlearn list", "train \udcff.yaml"),
]
