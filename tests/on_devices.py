"""What tests call in a process of its own, since its devices, compiler or patched functions are not theirs.

`in_a_process` calls it, with arguments and results that JSON can hold.
"""

import dataclasses
import io
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprefix.decode
import jaxprefix.inference
from benchmarks.memory import h100s
from benchmarks.shapes import SHAPES, model_config
from convert.weights import FiniteWeight
from jaxprefix import generate, load_model, load_tokenizer, loss, metrics, update
from jaxprefix.check import compiled_memory, compiled_update
from jaxprefix.cli import main
from jaxprefix.config import Compute
from jaxprefix.data.batches import make_packed_batch
from jaxprefix.data.shapes import PackedShape, PaddedShape
from jaxprefix.decode import _decode
from jaxprefix.evaluation import evaluate
from jaxprefix.inference_config import DecodeConfig, EvaluateConfig
from jaxprefix.machine.hosts import spread
from jaxprefix.models import abstract_model, attention, blocked, path_name
from jaxprefix.sampling import Sampling
from jaxprefix.sharding import base_sharding, decoded_rows, make_mesh, split_rows, with_split_rows
from jaxprefix.train import train
from tests.arrays import random_prefix
from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.examples import EXAMPLES
from tests.runs import printed_by, run_config

ON_CPUS = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
NEOX_20B = model_config(SHAPES["20b"])
SMALL = {"n_embd": 128, "n_inner": 512, "n_head": 8, "vocab_size": 440}


def in_a_process(function, *arguments, **environment):
    """Call one of the functions below in a process with these environment variables; return its result."""
    name = function.__name__
    program = f"import json, sys; from {__name__} import {name}; print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    return json.loads(printed_by(program, json.dumps(arguments), **environment).splitlines()[-1])


def runs_on_meshes(folder, settings, runs):
    """Train runs: by name their mesh, base, whether layers are scanned, and whether attention goes in blocks.

    Returns what `loaded_under_fsdp` does, so that no other process need start.
    """
    usual = attention.LONG_ROW, blocked.BLOCK
    for name, (mesh, base, scan_layers, in_blocks) in runs.items():
        attention.LONG_ROW, blocked.BLOCK = (1, 8) if in_blocks else usual
        jax.clear_caches()
        own = {"name": name, "mesh": mesh, "pretrained_model_dir": base, "compute": Compute(scan_layers=scan_layers)}
        train(run_config(Path(folder), **settings | own))
    return loaded_under_fsdp(settings["pretrained_model_dir"])


def n_parts(array):
    """Into how many parts an array is split."""
    return len({str(shard.index) for shard in array.addressable_shards})


def loaded_under_fsdp(folder):
    """For two meshes: how often a base's weights are read, into how many parts each is split, and a device's bytes."""
    read, n_read, found = FiniteWeight.read, [], []
    FiniteWeight.read = lambda *given: n_read.append(1) or read(*given)
    for sizes in ({"data": 2, "fsdp": 4}, {"fsdp": 8}):
        n_read.clear()
        leaves = jax.tree.leaves(load_model(folder, sharding_of=base_sharding(make_mesh(sizes), 4)))
        n_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        found.append((len(n_read), [*map(n_parts, leaves)], n_bytes))
    return found


def added_by_a_layer():
    """Temporary bytes and gathers that one more layer adds to an update under fsdp=8, for each way to compute it."""
    added = []
    for compute in (
        Compute(),
        Compute(remat="block"),
        Compute(scan_layers=True),
        Compute(remat="block", scan_layers=True),
    ):
        config = run_config(Path(), mesh="fsdp=8", compute=compute)
        models = (dataclasses.replace(NEOX_20B, n_layer=n, **SMALL | {"n_head": 4}) for n in (2, 4))
        fewer, more = (compiled_update(config, model, PaddedShape(8, 64)) for model in models)
        needed = (program.memory_analysis().temp_size_in_bytes for program in (more, fewer))
        gathers = (program.as_text().count(" all-gather(") for program in (more, fewer))
        added.append([(of_4 - of_2) / 2 for of_4, of_2 in (needed, gathers)])
    return added


def weights_that_wait():
    """Tell for each model, under fsdp and under tensor, whether attention's output weights wait for a layer's input."""
    told = []
    for shape in ("110m", "gpt2"):
        base = abstract_model(dataclasses.replace(model_config(SHAPES[shape]), n_layer=2, **SMALL))
        for axis in ("fsdp", "tensor"):
            mesh = make_mesh({axis: 8})
            hidden = jax.jit(lambda base, tokens, mesh=mesh: with_split_rows(base, mesh).hidden(tokens)[0])
            lines = hidden.lower(base, jnp.zeros((8, 64), jnp.int32)).as_text().splitlines()
            barriers = [line for line in lines if "optimization_barrier" in line and "128x128xf32" in line]
            told.append(len(barriers) > 0 and all("8x64x128xf32" in line for line in barriers))
    return told


def gathers_under_tensor():
    """How many gathers an update of each model has for padded, packed and long rows."""
    config, counts = run_config(Path(), mesh="tensor=8"), []

    def count(model, rows):
        counts.append(compiled_update(config, model, rows).as_text().count(" all-gather("))

    for shape in ("110m", "gpt2"):
        model = dataclasses.replace(model_config(SHAPES[shape]), n_layer=2, **SMALL)
        for rows in (PaddedShape(8, 64), PackedShape(2, 64, ((4, 32),)), PackedShape(2, 64, ((1, 32), (3, 16)), 24)):
            count(model, rows)
    attention.LONG_ROW, blocked.BLOCK = 64, 16
    jax.clear_caches()
    count(model, PaddedShape(8, 64))
    return counts


def packed_on_a_mesh():
    """How far a packed batch's loss and gradient on a mesh are from one device's, relative to the largest entry."""
    batch = make_packed_batch(EXAMPLES, load_tokenizer(GOLDEN_BASE), PackedShape(4, 24, ((1, 15), (2, 9))))

    def batch_loss(prefix, base, batch, mesh=None):
        return loss.batch_loss(base if mesh is None else with_split_rows(base, mesh), prefix, batch)

    computed = jax.jit(jax.value_and_grad(batch_loss), static_argnums=3)
    base = load_model(GOLDEN_BASE)
    prefix = random_prefix(base.config)
    right = computed(prefix, base, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = load_model(GOLDEN_BASE, sharding_of=base_sharding(mesh, base.config.n_head))
    ours = computed(prefix, placed, spread(batch, split_rows(mesh, axis=0)), mesh)
    return [float(abs(np.asarray(a) - b).max() / abs(b).max()) for a, b in zip(ours, right, strict=True)]


def arrays_added_up_by_a_layer():
    """How many arrays of all tokens one layer adds up over the GPUs of tensor=8: in bfloat16, in float32."""
    sizes = {"n_embd": 1024, "n_inner": 4096, "n_head": 16, "vocab_size": 512}
    config = run_config(Path(), mesh="tensor=8", dtype="bfloat16")
    with h100s(8):
        models = (dataclasses.replace(NEOX_20B, n_layer=n, **sizes) for n in (2, 4))
        fewer, more = (compiled_update(config, model, PaddedShape(8, 512)).as_text() for model in models)

    def numbers(program, dtype):
        shapes = re.findall(rf"= [(]*{dtype}\[([\d,]+)\].* all-reduce(?:-start)?\(", program)
        return sum(math.prod(map(int, shape.split(","))) for shape in shapes)

    of_two = (numbers(more, dtype) - numbers(fewer, dtype) for dtype in ("bf16", "f32"))
    return [n / 2 / (8 * 512 * sizes["n_embd"]) for n in of_two]


def told_of_the_mesh(folder):
    """Who splits packed rows under fsdp=8, how many devices the loss is told of, and in how many parts dev rows are."""
    told, next_token_loss, dev_batch_loss = set(), loss.next_token_loss, metrics.loss_on_mesh
    for module in (metrics, update):
        module.with_split_rows = lambda *given, name=module.__name__: told.add(name) or with_split_rows(*given)
    loss.next_token_loss = lambda *given: told.add(f"{given[3]} devices") or next_token_loss(*given)
    metrics.loss_on_mesh = lambda *given: told.add(f"{n_parts(given[2].tokens)} parts") or dev_batch_loss(*given)
    train(run_config(Path(folder), mesh="fsdp=8", n_training_steps=1, packing=True, save_model=False, save_log=False))
    return sorted(told)


def used_on_meshes():
    """The lines that `generate` and `evaluate` print on one device, and on two meshes."""
    base = ["--pretrained_model_dir", str(GOLDEN_BASE), "--prefix_checkpoint_path", str(GOLDEN / "forward.weight")]
    prompts = ["generate", *base, "--prompt", "朝の", "猫が", "昨日"]
    measured = ["evaluate", *base, "--n_samples", "5", "--json", "--data_filepath", str(GOLDEN / "documents.jsonl")]
    printed = []
    for mesh in ((), ("--mesh", "tensor=8"), ("--mesh", "data=2,fsdp=2,tensor=2")):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
            for command in (prompts, measured):
                assert main([*command, "--max_output_len", "12", *mesh]) == 0
        printed.append(out.getvalue().splitlines())
    return printed


def devices_that_evaluate():
    """How many devices hold the base, and in how many parts rows to decode are, when it is measured from Python.

    Without a mesh, and with one of eight devices.
    """
    counts = []

    def watched(*arguments):
        base = load_model(*arguments)
        counts.append(len(base.embed.weight.sharding.device_set))
        return base

    def watched_decode(base, prefix, rows, *others):
        counts.append(n_parts(rows))
        return _decode(base, prefix, rows, *others)

    jaxprefix.inference.load_model, jaxprefix.decode._decode = watched, watched_decode
    for mesh in None, "data=2,tensor=4":
        evaluate(EvaluateConfig(str(GOLDEN_BASE), n_samples=1, mesh=mesh, decode=DecodeConfig(max_output_len=2)))
    return counts


def generated_on_a_mesh_of_ones_own():
    """Tell for two lists of prompts whether a base split by hand continues them as a whole one."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = {1: P(), 2: P("model", None)}
    split = load_model(GOLDEN_BASE, sharding_of=lambda _, shape: NamedSharding(mesh, specs[len(shape)]))
    whole, tokenizer = load_model(GOLDEN_BASE), load_tokenizer(GOLDEN_BASE)
    same = []
    for prompts in ["朝の", "猫が"], ["朝の", "猫が", ""]:
        of_one, of_two = (generate(base, tokenizer, prompts, max_output_len=5) for base in (whole, split))
        same.append(of_one == of_two)
    return same


def decoded_under_tensor(*numbers_of_layers):
    """How many sums over devices, and how many gathers, the decoding of each model has under data=2,tensor=4."""
    return [_decoded_under_tensor(n_layer) for n_layer in numbers_of_layers]


def _decoded_under_tensor(n_layer):
    mesh = make_mesh({"data": 2, "tensor": 4})
    model = dataclasses.replace(model_config(SHAPES["110m"]), n_layer=n_layer, **SMALL)
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
    return [program.as_text().count(f" {kind}(") for kind in ("all-reduce", "all-gather")]


def needed_by_accumulation(*numbers_of_steps):
    """Temporary bytes of an update of so many micro-batches, in bfloat16."""
    model = dataclasses.replace(model_config(SHAPES["1m"]), n_layer=4, n_embd=512, n_inner=2048)
    configs = (run_config(Path(), dtype="bfloat16", n_accum_steps=number) for number in numbers_of_steps)
    return [compiled_memory(config, model, PaddedShape(8, 64))[1] for config in configs]
