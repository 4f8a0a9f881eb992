"""Kill one of two processes at a random moment: the other ends soon; restarted, the pair ends as an undisturbed one.

python -m tests.torture.pair --n_kills 2 --seed 0
"""

import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import tyro

from jaxprefix.config import TrainConfig
from tests.pairs import ended, start_pair
from tests.runs import assert_same_end, run_config
from tests.torture.kill import n_logged

SETTINGS = {"n_epochs": 20, "checkpoint_every_n_steps": 5}
"""80 updates."""
WITHIN = 60
"""Seconds in which the other process must end."""


def kill_one(config: TrainConfig, victim: int, n_updates: int, seconds: float) -> float:
    """Kill one process so long after so many updates; return the seconds until the other ends."""
    pair = start_pair(config)
    while n_logged(config) < n_updates:
        assert all(process.poll() is None for process in pair), ended(pair)
        time.sleep(0.01)
    time.sleep(seconds)
    pair[victim].kill()
    began = time.monotonic()
    codes, _, errors = ended(pair, timeout=WITHIN)
    assert codes[victim] == -signal.SIGKILL, "ended by itself before"
    assert codes[1 - victim] not in (0, 2), errors
    return time.monotonic() - began


def main(n_kills: int = 2, seed: int = 0) -> None:
    """Make the undisturbed run, then one for each kill, and print what happened."""
    dice = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxprefix-pair-"))
    whole = run_config(folder, "whole", **SETTINGS)
    codes, _, errors = ended(start_pair(whole))
    assert codes == [0, 0], errors
    for number in range(n_kills):
        config, victim = run_config(folder, f"killed{number}", **SETTINGS), number % 2
        seconds = kill_one(config, victim, dice.randrange(1, 70), dice.uniform(0, 0.2))
        n_done = n_logged(config)
        codes, _, errors = ended(start_pair(config, "--resume"))
        assert codes == [0, 0], errors
        assert_same_end(config, whole)
        print(f"process {victim} killed after update {n_done}: the other ended in {seconds:.1f} s", flush=True)
    print("prefix, newest checkpoint and metrics of each pair are the undisturbed one's, bit for bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
