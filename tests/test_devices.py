import jax
import pytest

from convert.errors import InputError
from jaxprefix.devices import devices, own_device


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'"), AssertionError("no plugin")])
def test_a_platform_that_does_not_work_is_told(monkeypatch, error):
    def find():
        raise error

    monkeypatch.setattr(jax, "devices", find)
    monkeypatch.setattr(jax, "local_devices", find)
    for ask in (devices, own_device):
        with pytest.raises(InputError, match=r"JAX cannot use its devices \(JAX_PLATFORMS=.*\): "):
            ask()
