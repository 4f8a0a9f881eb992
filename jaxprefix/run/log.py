"""The files that a run writes about itself: log.txt, metrics.jsonl, tensorboard/, and the screen."""

import contextlib
import functools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convert.errors import InputError, PlainError
from convert.files import replacing
from jaxprefix.machine.screen import UnfailingStream

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Writes log lines and metrics of a run; used as a context manager.

    With `folder` None, only the screen is written to; with `quiet`, not even that. A resumed run continues after update
    `from_step`. What was logged after that update, and its dev loss if it is `to_evaluate` again, is removed from
    metrics.jsonl.
    """

    def __init__(self, folder: Path | None, n_updates: int, from_step: int, to_evaluate: bool, quiet: bool):
        screen: Any = UnfailingStream(sys.stderr)  # `train` may be called without the command line around it
        looks: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        self._console = Console(file=screen, quiet=quiet, force_jupyter=False, **looks)
        self._started = time.monotonic()
        self._text = self._metrics = self._tensorboard = None
        if folder is not None:
            _keep_until(folder / METRICS_FILE, from_step, to_evaluate)
            self._text = (folder / "log.txt").open("a", encoding="utf-8")
            self._metrics = (folder / METRICS_FILE).open("a", encoding="utf-8")
            self._tensorboard = TensorBoard(folder / "tensorboard", from_step)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
        hidden = quiet or not self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, transient=True, disable=hidden, refresh_per_second=2)
        self._task = self._progress.add_task("", total=n_updates, completed=from_step, status="compiling")

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        for file in (self._text, self._metrics, self._tensorboard):
            if file is not None:
                file.close()

    def line(self, text: str) -> None:
        """Write a line to the screen and to log.txt, preceded by the seconds since the start."""
        text = self._seconds() + text
        self._console.print(text)
        if self._text is not None:
            print(text, file=self._text, flush=True)

    def ended_by(self, error: PlainError) -> None:
        """Append the error that ended the run to log.txt, which is closed by now; the caller shows it on the screen."""
        if self._text is not None:
            with contextlib.suppress(OSError), open(self._text.name, "a", encoding="utf-8") as file:
                print(f"{self._seconds()}error: {error}", file=file)

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._started:.2f}s "

    def move_bar(self, n_done: int, loss: float, tokens_per_s: float) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=n_done, status=f"loss {loss:.4g} · {tokens_per_s:,.0f} tokens/s")

    def point(self, split: str, step: int, epoch: int, **values: float | int) -> None:
        """Log loss, ppl, … of a split after `step` updates: screen, log.txt, metrics.jsonl and TensorBoard."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"split": split, "step": step, "epoch": epoch, **finite}
        if split == "train":
            where = f"Epoch {epoch}, step {step}, lr {values['lr']:.5g}"
            skipped = f", skipped updates: {values['skipped']}" if values.get("skipped") else ""
            speed = f", {values['tokens_per_s']:,.0f} tokens/s"
            self.line(f"{where} - loss: {values['loss']:.5g}, ppl: {values['ppl']:.5g}{speed}{skipped}")
        else:
            self.line(f"Epoch {epoch}, {split} - monitor: {values['loss']:.5g}, ppl: {values['ppl']:.5g}")
        if self._metrics is not None and self._tensorboard is not None:
            print(json.dumps(record), file=self._metrics, flush=True)
            self._tensorboard.scalars(step, {f"{name}/{split}": value for name, value in values.items()})

    def to_disk(self) -> None:
        """Flush metrics.jsonl to the disk: a checkpoint must not outlive the records of its updates."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())


class TensorBoard:
    """Writes scalars for TensorBoard; those after update `from_step` replace what was written before a resume.

    A dev loss that is measured again at `from_step` appears twice.

    The file is opened by the first scalars, so that a run's first log line does not wait for the import.
    """

    def __init__(self, folder: Path, from_step: int):
        self._folder, self._from_step = folder, from_step

    @functools.cached_property
    def _records(self) -> Any:
        # TensorBoard's own EventFileWriter would import TensorFlow where it is installed, and tensorboardX torch.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        now, again = time.time(), SessionLog(status=SessionLog.START)
        self._folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(now):010}.{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9:09}"
        records = RecordWriter((self._folder / name).open("xb"))
        records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        records.write(Event(wall_time=now, step=self._from_step + 1, session_log=again).SerializeToString())
        return records

    def scalars(self, step: int, values: dict[str, float | int]) -> None:
        """Write scalars by their tags."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        of_step = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._records.write(Event(wall_time=time.time(), step=step, summary=of_step).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file, if it has been begun."""
        if "_records" in vars(self):
            self._records.close()


def _keep_until(path: Path, step: int, to_evaluate: bool) -> None:
    """Drop from a metrics file the records of what will be done again, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = [
        line for line, at, split in _records(path) if at < step or (at == step and not (to_evaluate and split == "dev"))
    ]
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def check_metrics(folder: Path) -> None:
    """Raise InputError for a damaged line in a run's metrics.jsonl, which a resumed run could not go on from."""
    for _ in _records(folder / METRICS_FILE):  # reading raises
        pass


def _records(path: Path) -> Iterator[tuple[bytes, int, str]]:
    """Yield (line, step, split) for a metrics file's lines, if there is one, except a last line that was cut off."""
    if not path.is_file():
        return
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            found = line, record["step"] + 0, record["split"]  # TypeError unless the step is a number
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: line {number} is damaged; remove it and resume again") from error
        yield found
