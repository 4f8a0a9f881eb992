"""Tokenizing a large data file: speed and memory, the first time and from the cache.

python -m benchmarks.data --gigabytes 1
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.processes import descendants_memory, in_process
from benchmarks.report import publish, table
from benchmarks.shapes import SAMPLE, SMALL_BASE


def make_file(path: Path, n_bytes: int) -> None:
    """Write the sample documents over and over, each with a number of its own."""
    documents = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < n_bytes:
            lines = ({"text": f"{document}{number + i}"} for i, document in enumerate(documents))
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            number += len(documents)


def measure(path: Path, cache: str) -> dict[str, float]:
    """Read a file's examples in this process; return seconds, and the peak memory of it and its helpers together."""
    os.environ["XDG_CACHE_HOME"] = cache
    from jaxprefix import load_tokenizer
    from jaxprefix.data.examples import Chunking
    from jaxprefix.data.token_cache import load_examples

    tokenizer = load_tokenizer(SMALL_BASE)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, descendants_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    examples = load_examples(path, Chunking(tokenizer))
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak_bytes": max(peak, descendants_memory()), "examples": len(examples)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "data.jsonl"
        make_file(path, int(flags.gigabytes * 1e9))
        megabytes = path.stat().st_size / 1e6
        runs = [in_process(measure, path, temporary) for _ in range(2)]
    rows = [
        [way, f"{run['seconds']:.1f}", f"{megabytes / run['seconds']:.1f}", f"{run['peak_bytes'] / 1e6:.0f}"]
        for way, run in zip(("first time", "from the cache"), runs, strict=True)
    ]
    text = table(["examples of a file", "seconds", "MB/s", "peak MB, all processes"], rows)
    title = f"{megabytes:,.0f} MB of JSON Lines, {runs[0]['examples']:,} examples"
    publish(f"data_{flags.gigabytes:g}gb", f"{title}\n\n{text}", runs)


if __name__ == "__main__":
    main()
