import jax
import pytest

from convert.errors import InputError
from jaxprefix.devices import devices, own_device
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
