"""What the order of the data depends on, kept with a checkpoint and checked on resume."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from unlearn_llm.errors import UserError

FILE = "unlearn_plan.json"


@dataclass(frozen=True)
class Plan:
    """The settings that decide which row stands at which place of which step."""

    objective: str
    schedule: str
    seed: int
    refusal_seed: int
    window: int
    micro_batch: int
    forget_rows: int
    retain_rows: int
    pairing: str

    def write(self, folder: Path) -> None:
        """Write the plan beside a checkpoint."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint that was made under another plan.

        Raises:
            UserError: naming the first setting that differs.
        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} is no checkpoint of an unlearning run (no {FILE}).")
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for key, value in asdict(self).items():
            if saved.get(key) != value:
                raise UserError(
                    f"{folder} was made with {key}={saved.get(key)!r}, this run has {value!r}; it "
                    "would draw other rows. Resume with the same settings, or start anew."
                )
