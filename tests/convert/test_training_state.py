"""Files that are no training state."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convert.errors import InputError
from convert.training_state import folded_prefix, is_training_state, read_training_state, write_training_state

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
        (ENCODER | {"prefix_mlp.0.bias": torch.full((4,), torch.nan)}, "0.bias holds numbers that are not finite"),
        (ENCODER | {"prefix_mlp.0.bias": torch.ones(4, dtype=torch.int)}, "floating-point numbers, found int"),
        (ENCODER | {"prefix_mlp.0.bias": torch.ones(9)}, r"expected shape \(4,\), found \(9,\)"),
    ],
)
def test_what_is_no_encoders_state_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(InputError, match=message):
        read_training_state(tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_wte.weight": None}, "x: not the checkpoint of a prefix:\n  - missing encoder.prefix_wte.weight$"),
        ({"prefix_mlp.0.bias": torch.ones(9)}, r"0.bias: expected shape \(4,\), found \(9,\)$"),
    ],
)
def test_what_makes_no_prefix_is_told(changes, message):
    arrays = {f"encoder.{name}": array.numpy() for name, array in (ENCODER | changes).items() if array is not None}
    with pytest.raises(InputError, match=message):
        folded_prefix(arrays, Path("x"))


def test_moments_have_their_parameters_shapes(tmp_path):
    moments = {"exp_avg": dict(ENCODER), "exp_avg_sq": ENCODER | {"prefix_mlp.2.bias": torch.ones(9)}}
    torch.save({"encoder": ENCODER, "optimizer": {"step": 3, **moments}}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"nu.prefix_mlp.2.bias: expected shape \(8,\), found \(9,\)$"):
        read_training_state(tmp_path / "state.pt")


def test_a_moment_that_is_missing_is_told(tmp_path):
    moments = {"step": 3, "exp_avg": {}, "exp_avg_sq": ENCODER}
    torch.save({"encoder": ENCODER, "optimizer": moments}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"missing moments.1.0.mu.prefix_mlp.0.bias"):
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


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (torch.nan, "nu.prefix_mlp.0.bias holds numbers that are not finite"),
        (-1.0, "a mean of squares, holds negative"),
    ],
)
def test_one_bad_number_among_good_ones_is_told(tmp_path, number, message):
    squares = ENCODER | {"prefix_mlp.0.bias": torch.tensor([1.0, 1.0, number, 1.0])}
    content = {"encoder": ENCODER, "optimizer": {"step": 3, "exp_avg": ENCODER, "exp_avg_sq": squares}}
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(InputError, match=message):
        read_training_state(tmp_path / "state.pt")


@pytest.mark.parametrize("step", [2**31, -1])
def test_a_step_fits_the_count_of_updates(tmp_path, step):
    content = {"encoder": ENCODER, "optimizer": {"step": step, "exp_avg": ENCODER, "exp_avg_sq": ENCODER}}
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(InputError, match="step must be a whole number"):
        read_training_state(tmp_path / "state.pt")


def test_an_optimizer_without_its_encoder_is_an_incomplete_training_state():
    assert is_training_state({"optimizer": {"step": 3}})


def test_a_state_in_another_precision_becomes_float32(tmp_path):
    halved, doubled = (
        {name: tensor.to(dtype) for name, tensor in ENCODER.items()} for dtype in (torch.half, torch.double)
    )
    content = {"encoder": halved, "optimizer": {"step": 3, "exp_avg": doubled, "exp_avg_sq": halved}}
    torch.save(content, tmp_path / "state.pt")
    arrays = read_training_state(tmp_path / "state.pt")
    assert {array.dtype.name for name, array in arrays.items() if "count" not in name} == {"float32"}


@pytest.mark.parametrize("optimizer", [None, [3]])
def test_what_is_no_optimizers_state_is_none(tmp_path, optimizer):
    torch.save({"encoder": ENCODER, "optimizer": optimizer}, tmp_path / "state.pt")
    assert read_training_state(tmp_path / "state.pt").keys() == {f"encoder.{name}" for name in ENCODER}


def test_of_what_a_file_holds_three_names_are_all(tmp_path):
    torch.save({name: torch.ones(4) for name in "abc"}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"\(it holds 'a', 'b', 'c'\):"):
        read_training_state(tmp_path / "state.pt")
