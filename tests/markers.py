"""What a test needs that most machines lack."""

import importlib.util
import shutil
import subprocess

import jax
import pytest

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
needs_own_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0,
    reason="a process with mounts of its own needs Linux and its permission",
)
needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="compiling for a GPU needs pip install '.[cuda13]'"
)
