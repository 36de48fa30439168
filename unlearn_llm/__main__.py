"""`python -m unlearn_llm`, so that `accelerate launch -m unlearn_llm train ...` works."""

import sys

from unlearn_llm.cli import main


def _leave() -> None:
    """Leave the other processes in order; gloo's threads may abort a process that just ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        if not ended.code:  # after an error others may be waiting in a collective
            _leave()
        raise
