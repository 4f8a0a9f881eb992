"""How the processes of a run find each other: the settings. Joining them: `hosts.py`."""

import dataclasses

from convert.errors import InputError
from jaxprefix.settings import check_types


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Which processes make a run together; this one alone unless something is given. See docs/launch.md."""

    distributed: bool = False
    """One of many processes that SLURM, Open MPI, Kubernetes or a TPU pod started; the flags below are detected."""
    coordinator_address: str | None = None
    """host:port at which process 0 awaits the others."""
    num_processes: int | None = None
    """How many processes make the run."""
    process_id: int | None = None
    """Which of them this is, counted from 0."""
    stall_minutes: float = 30.0
    """Without an update, an evaluation or a checkpoint for so long, a process ends: another one hangs."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        problems = []
        named = ("coordinator_address", "num_processes", "process_id")
        missing = [f"--{name}" for name in named if getattr(self, name) is None]
        if self.distributed and len(missing) < len(named):
            problems.append(f"--distributed finds what {', '.join(f'--{name}' for name in named)} would tell")
        elif 0 < len(missing) < len(named):
            problems.append(f"many processes need {' and '.join(missing)}, too")
        host, _, port = (self.coordinator_address or "host:1").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            problems.append(f"--coordinator_address is host:port, found {self.coordinator_address!r}")
        if self.num_processes is not None and self.num_processes < 1:
            problems.append(f"--num_processes must be positive, is {self.num_processes}")
        elif self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 2**31):
            problems.append(f"--process_id must be at least 0 and below --num_processes, is {self.process_id}")
        if not self.stall_minutes > 0:
            problems.append(f"--stall_minutes must be positive, is {self.stall_minutes}")
        if problems:
            raise InputError.all("train:", problems)

    @property
    def several(self) -> bool:
        """Tell whether there is anyone to join."""
        return self.distributed or self.coordinator_address is not None
