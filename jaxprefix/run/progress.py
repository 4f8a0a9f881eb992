"""How far a run has come: what a checkpoint keeps beside its arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class Progress:
    """How far a run has come, besides its arrays."""

    n_done: int = 0
    best_dev_loss: float | None = None
    """Kept in the prefix's file, not in checkpoints, which are saved before their epoch is measured."""
    has_prefix: bool = False
    """Whether a prefix has been saved."""
    window: Sequence[Any] = ()
    """`LossSums` since the last log point."""
    n_skipped: int = 0
    """Updates that float16 has skipped in a row."""
    to_evaluate: bool = False
    """Whether an evaluation was due when this was saved; a resumed run begins with it, even if it was made since."""

    def to_save(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: all but the best dev loss."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "best_dev_loss"}
