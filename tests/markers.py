"""What a test needs that most machines lack."""

import importlib.util

import jax
import pytest

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="compiling for a GPU needs pip install '.[cuda13]'"
)
