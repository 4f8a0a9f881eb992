import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import jax
import pytest

from convert.errors import InputError
from jaxprefix.machine.devices import compiling_for, devices, own_device
from tests.runs import PATIENCE, run_config, start


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'"), AssertionError("no plugin")])
def test_a_platform_that_does_not_work_is_told(monkeypatch, error):
    def find():
        raise error

    monkeypatch.setattr(jax, "devices", find)
    monkeypatch.setattr(jax, "local_devices", find)
    for ask in (devices, own_device):
        with pytest.raises(InputError, match=r"JAX cannot use its devices \(JAX_PLATFORMS=.*\): "):
            ask()


def test_it_is_told_at_the_start_of_a_run(tmp_path):
    process = start(run_config(tmp_path), JAX_PLATFORMS="no_such_platform")
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert error.startswith("error: JAX cannot use its devices (JAX_PLATFORMS=no_such_platform): ")


GPU = types.SimpleNamespace(platform="gpu")


def test_programs_are_forgotten_only_where_others_would_be_traced(monkeypatch):
    forgotten, found = Mock(), devices()
    monkeypatch.setattr(jax, "clear_caches", forgotten)
    with compiling_for([*found]):
        assert not forgotten.called
    with compiling_for([GPU]):
        assert forgotten.call_count == 1
    assert (forgotten.call_count, devices()) == (2, found)


def test_two_threads_compile_for_devices_one_after_the_other():
    """Or the first one's would stay named for good."""
    inside, others = threading.Event(), []

    def second():
        inside.wait()
        with compiling_for([GPU]):
            others.append([*devices()])

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        with compiling_for([*reversed(jax.devices())]):
            inside.set()
            time.sleep(0.1)
            assert not others
        waiting.result()
    assert others == [[GPU]]
    assert [*devices()] == [*jax.devices()]
