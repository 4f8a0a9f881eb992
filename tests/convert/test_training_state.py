"""Files that are no training state."""

import numpy as np
import pytest
import torch

from convert.errors import InputError
from convert.training_state import read_training_state, write_training_state

ENCODER = {
    "prefix_wte.weight": torch.ones(2, 3),
    "prefix_mlp.0.weight": torch.ones(4, 3),
    "prefix_mlp.0.bias": torch.ones(4),
    "prefix_mlp.2.weight": torch.ones(8, 4),
    "prefix_mlp.2.bias": torch.ones(8),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a dict with the encoder's state, found list"),
        (ENCODER | {"prefix_wte.weight": torch.ones(6)}, r"prefix_wte.weight \(6,\) .* must have two axes"),
    ],
)
def test_what_is_no_encoders_state_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(InputError, match=message):
        read_training_state(tmp_path / "state.pt")


def test_moments_have_their_parameters_shapes(tmp_path):
    moments = {"exp_avg": dict(ENCODER), "exp_avg_sq": ENCODER | {"prefix_mlp.2.bias": torch.ones(9)}}
    torch.save({"encoder": ENCODER, "optimizer": {"step": 3, **moments}}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"nu.prefix_mlp.2.bias: expected shape \(8,\), found \(9,\)$"):
        read_training_state(tmp_path / "state.pt")


def test_what_is_missing_is_told_once(tmp_path):
    torch.save({name: value for name, value in ENCODER.items() if name != "prefix_wte.weight"}, tmp_path / "state.pt")
    with pytest.raises(InputError) as error:
        read_training_state(tmp_path / "state.pt")
    heading, *problems = str(error.value).split("\n  - ")
    assert (
        ": not the training state of a prefix encoder (it holds 'prefix_mlp.0.weight', 'prefix_mlp.0.bias'," in heading
    )
    assert problems == ["missing encoder.prefix_wte.weight"]


def test_writing_tells_what_the_source_has_too_much_and_too_little(tmp_path):
    with pytest.raises(InputError, match="run: not a training state of the original's encoder:") as error:
        write_training_state(tmp_path / "state.pt", {"encoder.prefix": np.ones(3)}, tmp_path / "run")
    problems = str(error.value).split("\n  - ")[1:]
    assert "missing encoder.prefix_wte.weight" in problems
    assert "encoder.prefix has no counterpart in the original's names" in problems
