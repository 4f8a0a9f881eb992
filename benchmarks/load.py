"""Loading a base model: time and peak memory, against reading the files and against transformers.

python -m benchmarks.load --shape 1.4b --disk float16 --dtype float16

The time runs until all weights are in memory: transformers maps files, and would read them only as they are used.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import alternate, peak_memory
from benchmarks.report import median, publish, ratio, table
from benchmarks.shapes import SHAPES, SMALL_BASE, make_folder

NUMBERS_OF_A_PAGE = 1024
"""float32 numbers in a memory page; of a smaller type, more fit."""


def drop_from_cache(folder: Path) -> int:
    """Drop the folder's weight files from the page cache; return their size in bytes."""
    size = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size += path.stat().st_size
    return size


def files_loader(folder: Path, _: str) -> Callable[[], None]:
    """Return a function that reads the files and keeps nothing of them."""
    buffer = bytearray(2**24)

    def load() -> None:
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    continue

    return load


def jaxprefix_loader(folder: Path, dtype: str) -> Callable[[], Any]:
    """Load a small model, so that all is imported and ready, and return a function that loads the model."""
    import jax

    from jaxprefix import load_model

    load_model(SMALL_BASE, dtype)
    return lambda: jax.block_until_ready(jax.tree.leaves(load_model(folder, dtype)))


def transformers_loader(folder: Path, dtype: str) -> Callable[[], Any]:
    """Return the same for transformers, onto a GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    where = {"device_map": "cuda"} if torch.cuda.is_available() else {}
    AutoModelForCausalLM.from_pretrained(SMALL_BASE, **where)

    def load() -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where)
        if where:
            torch.cuda.synchronize()
            return
        for weight in model.parameters():
            weight.detach().flatten()[::NUMBERS_OF_A_PAGE].sum()

    return load


WAYS = {"files": files_loader, "jaxprefix": jaxprefix_loader, "transformers": transformers_loader}


def measure(way: str, folder: Path, dtype: str) -> dict[str, float]:
    """Load once in this process; return seconds, and peak memory beyond what the imports took."""
    load = WAYS[way](folder, dtype)
    before, size = peak_memory(), drop_from_cache(folder)
    started = time.perf_counter()
    load()
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak_memory() - before, "file_bytes": size}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--disk", default="float16", help="type of the weights in the files")
    parser.add_argument("--dtype", default="float16", help="type to load them as")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "base", SHAPES[flags.shape], flags.disk, n_shards=3)
        results = alternate({way: (way, folder, flags.dtype) for way in WAYS}, measure, flags.rounds)
    file_bytes = results["files"][0]["file_bytes"]
    weights = file_bytes * np.dtype(flags.dtype).itemsize / np.dtype(flags.disk).itemsize
    rows = [
        [
            way,
            f"{median(r, 'seconds'):.2f}",
            f"{ratio(r, results['files'], 'seconds'):.2f}",
            f"{median(r, 'peak_bytes') / weights:.2f}",
        ]
        for way, r in results.items()
    ]
    text = table(["load", "seconds", "× reading the files", "peak memory ÷ weights"], rows)
    title = f"{flags.shape}, {file_bytes / 1e9:.2f} GB of {flags.disk} in three files, loaded as {flags.dtype}"
    publish(f"load_{flags.shape}_{flags.disk}_{flags.dtype}", f"{title}\n\n{text}", results)


if __name__ == "__main__":
    main()
