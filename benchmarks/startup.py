"""Seconds from the command to the end of the first update, of the real commands.

python -m benchmarks.startup --shape 110m

These are `jaxprefix train` with an empty cache of compiled programs, the same with what that run has left there, and
`python -m torch_ref.train` without DeepSpeed, which on a GPU computes in float16 by autocast, the original's default.
The end of the first update is when its log line appears; what comes after it (evaluation, saving) is cut off.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import use_one_gpu
from benchmarks.report import median, publish, ratio, table
from benchmarks.shapes import SAMPLE, SHAPES, make_folder

WAYS = ("cold", "warm", "torch_ref")  # cold comes before warm: it fills the cache


def command(way: str, folder: Path, data: Path, round_folder: Path) -> list[str]:
    """Return the command line of a run of one update, which is logged."""
    module = ["torch_ref.train"] if way == "torch_ref" else ["jaxprefix", "train", "--output_dir", round_folder]
    flags = ["--pretrained_model_dir", folder, "--data_filepath", data, "--save_name", way]
    flags += ["--train_data_size", 200, "--n_training_steps", 1, "--log_every_n_steps", 1]
    return [sys.executable, "-m", *map(str, [*module, *flags])]


def measure(way: str, folder: Path, data: Path, round_folder: Path) -> dict[str, float]:
    """Run the command up to the log line of its first update. Raises RuntimeError when it ends without one."""
    use_one_gpu()
    environment = os.environ | {"XDG_CACHE_HOME": str(round_folder)}
    arguments = command(way, folder, data, round_folder)
    started = time.perf_counter()
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if "step 1," in line:
                seconds = time.perf_counter() - started
                process.kill()
                return {"seconds": seconds}
    raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{''.join(lines)}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(flags.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_folder(Path(temporary) / "base", SHAPES[flags.shape])
            for way in WAYS:
                results[way].append(measure(way, folder, flags.data, Path(temporary)) | {"round": number})
    rows = []
    for way, runs in results.items():
        name = way if way == "torch_ref" else f"jaxprefix, {way} cache"
        rows.append([name, f"{median(runs, 'seconds'):.1f}", f"{ratio(runs, results['torch_ref'], 'seconds'):.2f}"])
    text = table(["command to the first update", "seconds", "÷ torch_ref"], rows)
    publish(f"startup_{flags.shape}", f"{flags.shape}, jaxprefix in float32, {flags.rounds} rounds\n\n{text}", results)


if __name__ == "__main__":
    main()
