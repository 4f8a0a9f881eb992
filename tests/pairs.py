"""Runs of two processes with two devices each, by the lines of docs/launch.md."""

import re
import socket
from pathlib import Path

from jaxprefix.config import TrainConfig
from tests.runs import PATIENCE, start

PAGE = Path(__file__).parent.parent / "docs" / "launch.md"
TWO_DEVICES = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def documented_flags() -> list[list[str]]:
    """The flags that docs/launch.md adds on each of two nodes, with this machine in the place of node0."""
    of_two_nodes = r"^jaxprefix train .*(--coordinator_address .* --process_id \d)$"
    lines = re.findall(of_two_nodes, PAGE.read_text(), re.MULTILINE)
    port = free_port()
    return [re.sub(r"node0:\d+", f"127.0.0.1:{port}", line).split() for line in lines]


def start_pair(config: TrainConfig, *flags: str, each=((), ()), **options):
    """Start both processes, with `flags`, and each with flags of its own."""
    own_flags = zip(documented_flags(), each, strict=True)
    return [start(config, *documented, *flags, *own, **TWO_DEVICES, **options) for documented, own in own_flags]


def ended(pair, timeout: float = PATIENCE):
    """Wait for both processes; return their exit codes, outputs and errors."""
    try:
        texts = [process.communicate(timeout=timeout) for process in pair]
    finally:
        for process in pair:
            process.kill()
    return [process.returncode for process in pair], *zip(*texts, strict=True)


def slurm(process: int, job: str) -> dict[str, str]:
    """The variables that srun sets for one of two tasks on a node."""
    place = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    return {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", **place}
