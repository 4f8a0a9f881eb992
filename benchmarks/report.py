"""What every benchmark reports: medians and ratios, the machine, a table, a file; and the flags that titles name."""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprefix.config import Compute

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
PACKAGES = ("jax", "flax", "torch", "transformers", "peft", "numpy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Features that decide how fast a CPU multiplies."""


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `Compute`."""
    parser.add_argument("--remat", default="elementwise", help="of jaxprefix: elementwise or block")
    parser.add_argument("--scan_layers", action="store_true", help="of jaxprefix: the layers in a loop")


def compute_of(flags: argparse.Namespace) -> Compute:
    """Return the `Compute` that the flags ask for."""
    return Compute(remat=flags.remat, scan_layers=flags.scan_layers)


def compute_title(compute: Compute) -> str:
    """Name in a title the flags of `Compute` that are not the default."""
    remat = "" if compute.remat == "elementwise" else f", --remat {compute.remat}"
    return remat + (", --scan_layers" if compute.scan_layers else "")


def compute_suffix(compute: Compute) -> str:
    """Name those flags in a file's name."""
    remat = "" if compute.remat == "elementwise" else f"_{compute.remat}"
    return remat + ("_scan" if compute.scan_layers else "")


def add_turns(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the rounds of `take_turns`."""
    parser.add_argument(
        "--alone", type=int, default=0, metavar="ROUNDS", help="one process at a time: what fills a GPU's memory"
    )


def turns_title(n_turns: int, what: str, n_rounds: int) -> str:
    """Describe the turns in a title."""
    return f"{n_rounds} rounds of {n_turns} {what}" if n_rounds else f"{n_turns} {what} in turn"


def ratio(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], field: str) -> float:
    """Return the median of a field's ratio, ours ÷ theirs, over the rounds or turns that both have; NaN for none."""
    beside = {_place(turn): turn[field] for turn in theirs}
    return median([{field: turn[field] / beside[_place(turn)]} for turn in ours if _place(turn) in beside], field)


def _place(turn: Mapping[str, Any]) -> tuple[int, int]:
    """Return the round and turn of a result."""
    return turn.get("round", 0), turn.get("turn", 0)


def median(results: Sequence[Mapping[str, Any]], field: str) -> float:
    """Return the median of a field; NaN without results."""
    return float(np.median([result[field] for result in results])) if results else math.nan


def largest(results: Sequence[Mapping[str, Any]], field: str) -> float:
    """Return the largest value of a field; NaN without results."""
    return max((result[field] for result in results), default=math.nan)


def gib(n_bytes: float) -> str:
    """Write bytes as GiB; a dash for none."""
    return f"{n_bytes / GIB:.2f}" if n_bytes else "—"


def machine() -> dict[str, Any]:
    """Describe machine and versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={chosen}")
    gpus = []
    if shutil.which(query[0]):
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        gpus = answer.stdout.splitlines() if answer.returncode == 0 else []
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": told.get("model name") or platform.machine(),  # ARM's has no name
        "cpu_family_model": [told.get(name) for name in ("cpu family", "model")],  # one name may stand for several
        "cpu_features": [name for name in CPU_FEATURES if name in told.get("flags", "").split()],
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "python": platform.python_version(),
        **versions,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def publish(name: str, text: str, results: Any) -> None:
    """Print a table, and write it with all results to results/NAME.json."""
    about = machine()
    family, model = about["cpu_family_model"]
    cpu = f"{about['cores']} cores, {about['cpu']}" + (f" (family {family}, model {model})" if family else "")
    where = "; ".join([cpu, *about["gpus"]])
    print(f"\n{text}\n\n{about['date']}, {where}; jax {about.get('jax')}, torch {about.get('torch')}")
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": about, "arguments": list(map(_told, sys.argv[1:])), "table": text, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _told(argument: str) -> str:
    """Return an argument; for a path, its name without the folder and, for a file, the start of its checksum."""
    path = Path(argument)
    checksum = f" (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}…)" if path.is_file() else ""
    return path.name + checksum
