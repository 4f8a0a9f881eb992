"""Log lines and TensorBoard scalars of a run."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist


def is_first_rank() -> bool:
    """Tell whether this process logs and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


class RunLog:
    """Lines on the first rank's stdout; files too with --save_log."""

    def __init__(self, flags: argparse.Namespace, stem: str):
        self.started = time.monotonic()
        self.text = self.board = None
        self.window: list[float] = []
        if flags.save_log and is_first_rank():
            self.text = Path(f"{stem}.log").open("a", encoding="utf-8")  # noqa: SIM115
            from torch.utils.tensorboard import SummaryWriter  # late: importing it takes a while

            self.board = SummaryWriter(f"{stem}.tensorboard")

    def line(self, text: str) -> None:
        """Print a line, preceded by the seconds since the start."""
        if is_first_rank():
            text = f"{time.monotonic() - self.started:.2f}s {text}"
            print(text, flush=True)
            if self.text:
                print(text, file=self.text, flush=True)

    def scalars(self, split: str, step: int, **values: float) -> None:
        """Write TensorBoard scalars."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"{name}/{split}", value, step)

    def train_point(self, epoch: int, step: int, rate: float) -> None:
        """Log the means over the window of micro-batches since the last point, and start a new one."""
        mean, ppl = float(np.mean(self.window)), float(np.mean(np.exp(self.window)))
        self.line(f"Epoch {epoch}, step {step}, lr {rate:.5g} - loss: {mean:.5g}, ppl: {ppl:.5g}")
        self.scalars("train", step, loss=mean, ppl=ppl)
        self.window = []

    def close(self) -> None:
        """Close the files."""
        for file in (self.text, self.board):
            if file:
                file.close()
