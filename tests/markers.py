"""What a test needs that most machines lack."""

import importlib.util
import shutil
import subprocess

import jax
import pytest

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
BOOT_ID = "/proc/sys/kernel/random/boot_id"
ON_ANOTHER_HOST = ("unshare", "--mount", "sh", "-c", f'mount --bind "$0" {BOOT_ID} && exec "$@"')
"""Runs a command as on another host, by the boot id in a file; JAX knows hosts apart by it."""


def can_be_another_host() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*ON_ANOTHER_HOST, BOOT_ID, "true"], capture_output=True, check=False).returncode == 0


needs_another_host = pytest.mark.skipif(
    not can_be_another_host(), reason="a process with mounts of its own needs Linux and its permission"
)
needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="compiling for a GPU needs pip install '.[cuda13]'"
)
