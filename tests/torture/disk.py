"""A run meets a full disk, a read-only folder and a removed one, and ends plainly; on a small file system of its own.

unshare --user --map-root-user --mount python -m tests.torture.disk FOLDER
"""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jaxprefix.config import TrainConfig
from jaxprefix.run.checkpoint import Checkpoints, newest_checkpoint
from jaxprefix.run.description import is_run_folder
from tests.runs import PATIENCE, run_config, start

OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
SMALL = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs"]


def can_mount(folder: Path) -> bool:
    """Tell whether this machine lets us have mounts of our own."""
    command = [*OWN_MOUNTS, *SMALL, folder]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


def error_of(config: TrainConfig, disturb: Callable[[], None], *flags: str) -> str:
    """Start a run, disturb it once it has saved a checkpoint, and return the error that it ends with."""
    checkpoints = config.run_dir / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    process = start(config, *flags)
    while newest_checkpoint(checkpoints) == newest and process.poll() is None:
        time.sleep(0.02)
    disturb()
    _, text = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, text
    assert "Traceback" not in text, text
    error = text.splitlines()[-1]
    print(error)
    return error


def last_good(config: TrainConfig, error: str) -> int:
    """Load the checkpoint that an error names as the last good one."""
    with Checkpoints(config.run_dir / "checkpoints", writing=False) as checkpoints:
        _, progress = checkpoints.read()
    [named] = re.findall(r"the last good (?:one|checkpoint) is (?:.*/)?(\d+)", error)
    assert progress["n_done"] == int(named), error
    return progress["n_done"]


def main(folder: Path) -> None:
    """Fill the disk, resume and make the folder read-only, resume and remove it."""
    subprocess.run([*SMALL, folder], check=True)
    config = run_config(folder, n_epochs=100_000, checkpoint_every_n_steps=2, log_every_n_steps=1000)
    ballast = folder / "ballast"

    def fill() -> None:
        for _ in range(20):  # the run makes room when it removes an old checkpoint
            with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            time.sleep(0.1)

    def make_read_only() -> None:
        subprocess.run(["mount", "--bind", config.run_dir, config.run_dir], check=True)
        remount = ["mount", "-o", "remount,bind,ro", config.run_dir]
        while subprocess.run(remount, stderr=subprocess.DEVNULL).returncode:  # busy while the run writes a file
            time.sleep(0.01)

    error = error_of(config, fill)
    assert "No space left on device" in error
    full_at = last_good(config, error)
    ballast.unlink()

    error = error_of(config, make_read_only, "--resume")
    assert "Read-only file system" in error
    assert last_good(config, error) > full_at
    subprocess.run(["umount", config.run_dir], check=True)

    def remove() -> None:
        while is_run_folder(config.run_dir):  # meanwhile the run writes and removes files itself, which rmtree minds
            shutil.rmtree(config.run_dir, ignore_errors=True)

    error = error_of(config, remove, "--resume")
    assert "vanished while the run was going on" in error
    assert not is_run_folder(config.run_dir)  # TensorStore makes folders again for what it is about to write


if __name__ == "__main__":
    main(Path(sys.argv[1]))
