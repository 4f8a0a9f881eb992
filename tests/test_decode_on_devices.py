"""Generating and measuring with a base model that several devices share."""

import ast
import json

import pytest

from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.runs import ON_CPUS, printed_by
from tests.tolerances import LOSS

USED_ON_DEVICES = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from jaxprefix.cli import main

for mesh in ((), ("--mesh", "tensor=8"), ("--mesh", "data=2,fsdp=2,tensor=2")):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        for command in (("generate", "--prompt", "朝の", "猫が", "昨日"), ("evaluate", "--n_samples", "5", "--json")):
            options = ("--data_filepath", sys.argv[3]) if command[0] == "evaluate" else ()
            base = ("--pretrained_model_dir", sys.argv[1], "--prefix_checkpoint_path", sys.argv[2])
            assert main([*command, *base, *options, "--max_output_len", "12", *mesh]) == 0
    print(repr(out.getvalue()))
"""


def test_devices_that_share_the_base_generate_and_measure_what_one_does():
    used = printed_by(USED_ON_DEVICES, GOLDEN_BASE, GOLDEN / "forward.weight", GOLDEN / "documents.jsonl", **ON_CPUS)
    of_one, *of_several = (ast.literal_eval(line).splitlines() for line in used.splitlines())
    measured = json.loads(of_one[-1])
    for lines in of_several:
        assert lines[:-1] == of_one[:-1]
        for way, values in json.loads(lines[-1]).items():
            assert values == pytest.approx(measured[way], rel=LOSS)


MEASURED_FROM_PYTHON = """
import sys
import jaxprefix.inference
from jaxprefix.evaluation import evaluate
from jaxprefix.inference import load_model
from jaxprefix.inference_config import DecodeConfig, EvaluateConfig

def watched(*arguments):
    base = load_model(*arguments)
    print(len(base.embed.weight.sharding.device_set))
    return base

jaxprefix.inference.load_model = watched
for mesh in None, "tensor=8":
    evaluate(EvaluateConfig(sys.argv[1], n_samples=1, mesh=mesh, decode=DecodeConfig(max_output_len=2)))
"""


def test_from_python_too_one_device_measures_unless_a_mesh_is_given():
    assert printed_by(MEASURED_FROM_PYTHON, GOLDEN_BASE, **ON_CPUS).split() == ["1", "8"]


GENERATED_ON_A_MESH_OF_ONES_OWN = """
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxprefix import generate, load_model, load_tokenizer
from tests.base_folders import GOLDEN_BASE

mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
specs = {1: P(), 2: P("model", None)}
split = load_model(GOLDEN_BASE, sharding_of=lambda _, shape: NamedSharding(mesh, specs[len(shape)]))
whole, tokenizer = load_model(GOLDEN_BASE), load_tokenizer(GOLDEN_BASE)
for prompts in ["朝の", "猫が"], ["朝の", "猫が", ""]:
    of_one, of_two = (generate(base, tokenizer, prompts, max_output_len=5) for base in (whole, split))
    print(of_one == of_two)
"""


def test_a_model_on_a_mesh_of_ones_own_generates():
    assert printed_by(GENERATED_ON_A_MESH_OF_ONES_OWN, **ON_CPUS).split() == ["True"] * 2


DECODED_UNDER_TENSOR = """
import dataclasses, re
import jax, jax.numpy as jnp, numpy as np
from benchmarks.shapes import SHAPES, model_config
from jaxprefix.decode import _decode
from jaxprefix.sampling import Sampling
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.models import abstract_model, path_name
from jaxprefix.sharding import base_sharding, decoded_rows, make_mesh

sizes = {"n_embd": 128, "n_inner": 512, "n_head": 8, "vocab_size": 440}
mesh = make_mesh({"data": 2, "tensor": 4})
for n_layer in 1, 3:
    model = dataclasses.replace(model_config(SHAPES["110m"]), n_layer=n_layer, **sizes)
    place = base_sharding(mesh, model.n_head)
    base = jax.tree.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path_name(path), leaf.shape)),
        abstract_model(model),
    )
    rows, _ = decoded_rows(base)
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((4, 16), (4,)))
    prefix = jax.ShapeDtypeStruct((n_layer, 2, 10, 8, 16), jnp.float32)
    sampling = Sampling(1.0, 1.0, np.uint32(0), 0)
    program = _decode.lower(base, prefix, tokens, lengths, sampling, 8, 2, DecodeConfig(max_output_len=8)).compile()
    print(*(program.as_text().count(f" {kind}(") for kind in ("all-reduce", "all-gather")))
"""


def test_devices_that_share_heads_add_up_twice_in_a_layer_for_a_token_and_gather_nothing_of_it():
    """A layer's part of the prompt, and of each token: sums behind attention and MLP, no weights, keys or values."""
    (sums_of_1, gathers_of_1), (sums_of_3, gathers_of_3) = (
        map(int, line.split()) for line in printed_by(DECODED_UNDER_TENSOR, **ON_CPUS).splitlines()
    )
    assert (sums_of_3 - sums_of_1) / 2 == 2 * 2
    assert gathers_of_3 == gathers_of_1
