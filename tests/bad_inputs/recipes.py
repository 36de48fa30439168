"""Faults of recipes and suites, and of the YAML they are written in."""

from dataclasses import replace

from bad_inputs.case import EVAL, RECIPE, Bad


def text(what: str, place: str, remedy: str, content: str | bytes) -> Bad:
    """A fault of the recipe's text."""
    return Bad(what, place, remedy, files={"mine.yaml": content})


def key(what: str, remedy: str, *overrides: str, place: str | None = None) -> Bad:
    """A setting that cannot be."""
    return Bad(what, place or overrides[0].partition("=")[0], remedy, more=overrides)


def suite(what: str, place: str, remedy: str, content: str | bytes) -> Bad:
    """A fault of a suite's text."""
    command = EVAL.replace("--suite synthetic", "--suite mine_suite.yaml")
    return Bad(what, place, remedy, command, files={"mine_suite.yaml": content})


BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a, *a]\n" for n in range(30))

LEARN = """
kind: finetune
model: {path: good}
data: {train: [retain.jsonl], template: plain, max_length: 64}
train: {output_dir: out, max_steps: 1, use_cpu: true}
"""

CASES = [
    text("empty recipe", "mine.yaml", "expected sections", ""),
    text("a list for a recipe", "mine.yaml", "expected sections", "- model\n"),
    text("a binary for a recipe", "mine.yaml", "Save it as UTF-8", b"\xff\xfe\x00\x01"),
    text("control characters", "mine.yaml", "special characters", "model: {path: a\x07b}"),
    text("a key twice", "mine.yaml, line 6", "stands twice", RECIPE.rstrip() + "\ndata: {}\n"),
    text(
        "a tag that calls Python",
        "line 1",
        "tags are not read",
        "a: !!python/object/apply:os.system [ls]",
    ),
    text("a bomb of aliases", "line 2", "write the value out", BOMB),
    text("tabs", "line 2", "Indent with blanks", "model:\n\tpath: good\n"),
    text("an open bracket", "mine.yaml, line", "expected", "model: {path: good"),
    text("deep YAML", "mine.yaml", "nested too deeply", "model: " + "[" * 5000),
    text("a key that is a number", "line 1", "key that is text", "1: 2\n"),
    text(
        "a section that is none", "mine.yaml: modl", "Did you mean 'model'", "modl: {path: good}\n"
    ),
    text("a name that leads out", "name", "expected parts", "name: ../../x" + RECIPE),
    text("an absolute name", "name", "expected parts", "name: /etc/x" + RECIPE),
    text("a name of 300 letters", "name", "200", f"name: {'x' * 300}" + RECIPE),
    text("a name of two lines", "name", "printable", 'name: "a\\nb"' + RECIPE),
    text("a name that turns the writing", "name", "printable", 'name: "a\\u202eb"' + RECIPE),
    text("variants that are none", "variants", "expected axes", "variants: [a]" + RECIPE),
    Bad("unknown recipe", "mime.yaml", "unlearn list", "train mime.yaml"),
    Bad("unknown name of a recipe", "tofu/phi", "unlearn list", "train tofu/phi"),
    Bad(
        "a folder for a recipe",
        "folder.yaml",
        "unlearn list",
        "train folder.yaml",
        files={"folder.yaml": None},
    ),
    Bad(
        "a recipe to fine-tune",
        "mine is",
        "unlearn finetune",
        files={"mine.yaml": "kind: finetune\nmodel: {path: good}\ndata: {train: [retain.jsonl]}"},
    ),
    *(
        Bad(what, place, remedy, "finetune learn.yaml --overwrite", more, {"learn.yaml": LEARN})
        for what, place, remedy, *more in (
            ("no rows to learn", "gone.jsonl", "There is no file", "data.train=[gone.jsonl]"),
            ("learning no step", "train.max_steps", "from 1", "train.max_steps=0"),
            (
                "learning with LoRA on nothing",
                "model.lora",
                "q_proj",
                "model.lora={target_modules: [x]}",
            ),
            (
                "learning for 0 rows a step",
                "device_train_batch_size",
                "from 1",
                "train.per_device_train_batch_size=0",
            ),
        )
    ),
    Bad("a recipe to unlearn", "mine", "unlearn train", "finetune mine.yaml"),
    key("a word for a number", "expected a number", "train.learning_rate=fast"),
    key("`no` for false", "expected true or false", "train.bf16=no"),
    key("an endless rate", "finite", "train.learning_rate=1e400"),
    key("a rate below zero", "expected a number from 0", "train.learning_rate=-1e-5"),
    key("no step", "from 1", "train.max_steps=0"),
    key("no epoch", "from 1", "train.num_train_epochs=0", "train.max_steps=-1"),
    key("a batch of none", "expected a number from 1", "train.per_device_train_batch_size=0"),
    key("accumulation of none", "expected a number from 1", "train.gradient_accumulation_steps=0"),
    key("a length of none", "expected a number from 1", "data.max_length=0"),
    key("an octal", "expected a whole number", "train.max_steps=010"),
    key("a mistyped key", "Did you mean 'learning_rate'", "train.learning_rat=1"),
    key("a mistyped objective", "Did you mean 'idk'", "train.objective=idkk+gd"),
    key("half an objective", "forget+retain", "train.objective=idk"),
    key("an objective from a module that is none", "no_such", "train.objective=no_such:loss+gd"),
    key("a mistyped optimizer", "Did you mean", "train.optimizer=dual_adam"),
    key("a mistyped schedule", "Did you mean", "train.schedule=altrnate"),
    key(
        "a dual optimizer with a joint schedule",
        "schedule: alternate",
        "train.optimizer=dual_adamw",
        "train.schedule=joint",
        "train.schedule_parameters={}",
    ),
    key("a token for the hub", "hf auth login", "train.hub_token=hf_secret"),
    key("an unknown template", "expected chat", "data.template=lama2"),
    key("an unknown suite", "Did you mean 'tofu'", "evaluate={suite: tofoo}", place="evaluate"),
    key(
        "a reference that is missing",
        "There is no file",
        "evaluate={suite: synthetic, reference: gone.jsonl}",
        place="gone.jsonl",
    ),
    key("evaluation without a suite", "evaluate section", "train.eval_strategy=steps"),
    Bad(
        "trainable weights that are none",
        "trainable",
        "names look like",
        more=("train.trainable=nothing",),
        shows_late=True,
    ),
    key("trainable weights by no pattern", "regular expression", "train.trainable=(["),
    suite("empty suite", "mine_suite.yaml", "expected keys", ""),
    suite(
        "suite with an unknown metric",
        "mine_suite.yaml",
        "Did you mean",
        "name: mine\nprobes: {a: {source: forget.jsonl, metrics: [rougee]}}\nscores: {}\n",
    ),
    suite(
        "suite with an unknown key",
        "mine_suite.yaml",
        "probes is missing",
        "name: mine\nprobs: {}\n",
    ),
    suite(
        "suite with a tag", "mine_suite.yaml, line 1", "tags", "name: !!python/name:os.system ''\n"
    ),
    replace(
        suite(
            "suite over a missing file",
            "gone.jsonl",
            "There is no file",
            "name: mine\nprobes: {a: {source: gone.jsonl, metrics: [rouge]}}\n"
            "scores: {b: {aggregate: mean, options: {probe: a, metric: rouge}}}\n",
        ),
        shows_late=True,
    ),
    Bad("a mistyped field of the suite", "limt", "Did you mean 'limit'", EVAL, ("limt=3",)),
    Bad("a limit of none", "limit", "greater than or equal to 1", EVAL, ("limit=0",)),
]
