"""Kill a run at random moments, resume it each time, and compare its end with an undisturbed run's, bit for bit.

python -m tests.torture.kill --n_kills 30 --seed 0
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import tyro

from jaxprefix.config import TrainConfig
from jaxprefix.run.checkpoint import KEPT, newest_checkpoint
from tests.runs import assert_same_end, metrics_of, run_config, start

SETTINGS = {"batch_size": 1, "n_epochs": 30, "checkpoint_every_n_steps": 5}
"""420 updates, of which every fifth, and the last one of every fourteen, is followed by a checkpoint."""
MOST_UPDATES = 24
"""Most updates of a sitting before it is killed: on average, 30 sittings do not finish the run."""


class DiskMeter(threading.Thread):
    """Measures repeatedly, in the background, how many bytes a folder takes."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder = folder
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, size_of(self.folder))
            time.sleep(0.01)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, some of which may vanish meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def is_writing(config: TrainConfig) -> bool:
    """Tell whether a checkpoint is unfinished."""
    return any((config.run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def finish(config: TrainConfig, *flags: str) -> None:
    """Make a whole run, or what is left of one."""
    process = start(config, *flags)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def startup(config: TrainConfig) -> float:
    """Return the seconds until a run has made an update, when all programs are compiled already."""
    began = time.monotonic()
    process = start(config)
    while not n_logged(config):
        let_run(process, 0.01)
    process.kill()
    process.communicate()
    return time.monotonic() - began


def let_run(process: subprocess.Popen[str], seconds: float) -> None:
    """Let a run go on for some time, in which it must not end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        raise AssertionError(f"ended by itself: {process.communicate(timeout=seconds)}")


def sit(config: TrainConfig, seconds: float, n_updates: int, aimed: bool) -> tuple[int, bool]:
    """Go on with the run, and kill it `seconds` after n_updates more and, if `aimed`, the beginning of a checkpoint.

    Returns how many of its updates are lost, and whether a checkpoint was being written.
    """
    metrics, began = config.run_dir / "metrics.jsonl", time.time()
    done = newest_checkpoint(config.run_dir / "checkpoints") or 0
    process = start(config, *(["--resume"] if (config.run_dir / "config.json").exists() else []))

    def trains() -> bool:
        return metrics.exists() and metrics.stat().st_mtime > began

    while n_updates and not (trains() and n_logged(config) >= done + n_updates):
        let_run(process, 0.01)
    while aimed and not is_writing(config):
        let_run(process, 0.001)
    let_run(process, seconds)
    process.kill()
    _, errors = process.communicate()
    assert "WARNING" not in errors, errors
    if not trains():
        return 0, False
    return n_logged(config) - (newest_checkpoint(config.run_dir / "checkpoints") or 0), is_writing(config)


def main(n_kills: int = 30, seed: int = 0) -> None:
    """Make the undisturbed run, then the other, and print what happened."""
    dice = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxprefix-kill-"))
    whole, config, timed = (run_config(folder, name, **SETTINGS) for name in ("whole", "killed", "timed"))
    finish(whole)
    startup_seconds = startup(timed)
    disk = DiskMeter(config.run_dir / "checkpoints")
    disk.start()
    n_lost = n_writing = 0
    for number in range(1, n_kills + 1):
        n_updates, aimed = dice.randint(1, MOST_UPDATES), number % 3 == 0
        if number % 3 == 1:  # while it starts
            n_updates, seconds = 0, dice.uniform(0, startup_seconds)
        else:
            seconds = dice.uniform(0, 0.05)
        lost, writing = sit(config, seconds, n_updates, aimed)
        n_lost += lost
        n_writing += writing
        where = ", while a checkpoint was written" if writing else ""
        print(f"kill {number:2}: {lost} updates lost after {newest_checkpoint(disk.folder)}{where}", flush=True)
    finish(config, "--resume")
    assert_same_end(config, whole)
    one = size_of(whole.run_dir / "checkpoints") / KEPT
    assert disk.most <= (KEPT + 1.5) * one, "checkpoints pile up"  # the new one is there before the oldest is removed
    print(f"{n_kills} kills, {n_writing} of them while a checkpoint was written; seed {seed}")
    print(
        f"{n_lost} updates were lost and made again; metrics.jsonl has each of {len(metrics_of(config.run_dir))} once"
    )
    print("prefix, newest checkpoint and metrics are the undisturbed run's, bit for bit")
    print(f"checkpoints never took more disk than {disk.most / one:.2f} of them, {one / 1000:.0f} kB each")
    shutil.rmtree(folder)


def n_logged(config: TrainConfig) -> int:
    """Return the last update that a killed run has logged; its last line may be cut off."""
    metrics = config.run_dir / "metrics.jsonl"
    whole, _, _ = metrics.read_text().rpartition("\n") if metrics.exists() else ("", "", "")
    return max((json.loads(line)["step"] for line in whole.splitlines()), default=0)


if __name__ == "__main__":
    tyro.cli(main)
