"""What `jaxprefix check` reports about a training run before it starts: base model, tokenizer, data, memory."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprefix.base_folder import base_identity, open_base
from jaxprefix.config import CheckConfig, TrainConfig, mesh_sizes
from jaxprefix.data.batches import Batch, Packing
from jaxprefix.data.examples import Examples
from jaxprefix.data.rows import label_counts
from jaxprefix.data.shapes import PackedShape, PaddedShape, Shape, round_up
from jaxprefix.inputs import batch_shapes, divided, load_data
from jaxprefix.machine.devices import devices
from jaxprefix.machine.memory import GIB
from jaxprefix.metrics import dev_batches, loss_on_mesh
from jaxprefix.models import BaseModel, abstract_model, check_weights, held_dtype, path_name, weight_shapes
from jaxprefix.models.attention import check_attention
from jaxprefix.models.config import ModelConfig
from jaxprefix.recipe import RECIPES
from jaxprefix.sharding import base_sharding, make_mesh, n_row_parts, replicated, split_rows
from jaxprefix.start import abstract_state, earlier_arrays, start_encoder
from jaxprefix.tokenizer import Tokenizer
from jaxprefix.update import FrozenBase, learning_rate, make_update
from jaxprefix.vocabularies import SentencePiece


def check(config: CheckConfig) -> Iterator[str]:
    """Yield the report line by line. Raises InputError for anything that would stop a run."""
    base = open_base(config.pretrained_model_dir, config.revision, config.model_type)
    folder, model, tokenizer = base
    if Path(config.pretrained_model_dir).is_dir():  # a hub id's weights may not be downloaded yet
        check_weights(folder, model)
    if config.checkpoint_path is not None:  # read it as a new run would
        earlier = earlier_arrays(config, base_identity(model, tokenizer))
        start_encoder(config, abstract_model(model, config.compute), tokenizer, earlier)
    check_attention(config.compute.attention, model.head_dim)
    yield from describe_model(model, tokenizer)
    if config.data_filepath is None:
        yield describe_suffix(config.suffix, tokenizer)
        n_columns = config.max_seq_len + 1
        model.check_vocabulary(tokenizer.vocab_size)
        model.check_fit(config.prefix_seq_len, n_columns, "the longest row")
    else:
        examples = load_data(config, model, tokenizer)
        yield from describe_data(examples, tokenizer)
        if examples.tally.n_sentences:
            yield describe_suffix(config.suffix, tokenizer)
        inputs = divided(config, base, examples)
        n_columns = inputs.longest_row
        yield from examples.tally.report(config.data_filepath)
    yield f"positions: prefix {config.prefix_seq_len} + longest row {n_columns} of {model.max_positions:,}"
    if config.hosts.several:
        yield "memory: not estimated for several hosts, since one does not see the others' devices"
        return
    mesh = make_mesh(mesh_sizes(config.mesh))
    shape: Shape = PaddedShape(round_up(2 * config.batch_size, n_row_parts(mesh)), n_columns)
    dev_batch = None
    if config.data_filepath is not None:
        shape = batch_shapes(config, inputs, mesh)[-1]
        dev_batch = next(dev_batches(config, inputs, mesh))
    yield from describe_memory(config, model, shape, dev_batch)


def describe_model(model: ModelConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield lines that describe the base model and its tokenizer."""
    n_parameters = sum(int(np.prod(shape)) for shape in weight_shapes(model).values())
    residual = "" if model.model_type == "gpt2" else (", parallel" if model.parallel_residual else ", sequential")
    rotary = f", rotary {model.rotary_fraction:g} base {model.rotary_base:g}" if model.rotary_dim else ""
    if model.rotary_scaling != "default":
        rotary += f" {model.rotary_scaling} scaling × {model.rotary_factor:g}"
    head = "tied head" if model.tied_head else "untied head"
    yield (
        f"base model: {model.model_type}, {model.n_layer} layers × {model.n_embd}, {model.n_head} heads of "
        f"{model.head_dim}, {model.activation}{residual}{rotary}, {head}"
    )
    yield f"parameters: {n_parameters:,}"
    kind = "SentencePiece" if isinstance(tokenizer.vocabulary, SentencePiece) else "tokenizer.json"
    padded = f", padded to {model.vocab_size:,}" if model.vocab_size > tokenizer.vocab_size else ""
    unknown = "none" if tokenizer.unk_id is None else tokenizer.unk_id
    yield (
        f"tokenizer: {kind}, {tokenizer.vocab_size:,} pieces{padded}; bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, "
        f"pad {tokenizer.pad_id}, unknown {unknown}"
    )


def describe_data(examples: Examples, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield lines on a file's examples: how many, how long, with unknown tokens, with end-of-text in their targets."""
    lengths = examples.prompt_lengths + examples.target_lengths
    quantiles = {share: int(np.quantile(lengths, share)) for share in (0, 0.5, 0.95, 1)}
    yield (
        f"data: {len(examples):,} examples, {label_counts(examples).sum():,} tokens with a loss; lengths from "
        f"{quantiles[0]}, median {quantiles[0.5]}, 95 % {quantiles[0.95]}, longest {quantiles[1]} tokens"
    )
    yield from examples.report_unknown(tokenizer.unk_id)
    yield from examples.report_eos(tokenizer.eos_id)


def describe_suffix(suffix: str, tokenizer: Tokenizer) -> str:
    """Say whether the suffix can be learnt."""
    if not suffix:
        return "suffix: none"
    if flaw := tokenizer.why_unlearnable(suffix):
        return f"suffix {suffix!r}: {flaw}; it CANNOT BE LEARNT"
    return f"suffix {suffix!r}: {len(tokenizer.encode(suffix))} token(s)"


def describe_memory(
    config: TrainConfig, model: ModelConfig, shape: Shape, dev_batch: Batch | None = None
) -> Iterator[str]:
    """Say how much memory an update needs on each device, and the dev set's batches if they need more."""
    weights, work = training_memory(config, model, shape)
    n_devices = len(devices())
    how = "packed" if isinstance(shape, PackedShape) else "padded"
    rows = f"{how} to {shape.n_rows} rows × {shape.n_columns} tokens"
    yield (
        f"memory for an update of {config.batch_size} × {config.n_accum_steps} examples, {rows}, in {config.dtype}, "
        f"on each of {n_devices} device(s): {weights / GIB:.2f} GiB weights and state + {work / GIB:.2f} GiB work"
    )
    if dev_batch is not None and (dev_work := dev_memory(config, model, dev_batch)) > work:
        n_rows, n_columns = dev_batch.tokens.shape
        yield f"memory for the dev set, {n_rows} rows × {n_columns} tokens at a time: {dev_work / GIB:.2f} GiB work"


def training_memory(config: TrainConfig, model: ModelConfig, shape: Shape) -> tuple[int, int]:
    """Return the bytes that an update needs on each device, as the compiler reports them: (weights and state, work)."""
    return extrapolated(model, lambda model: compiled_memory(config, model, shape))


def dev_memory(config: TrainConfig, model: ModelConfig, batch: Batch) -> int:
    """Return the bytes of work that the loss of a batch [rows, columns] of the dev set needs on each device."""
    return extrapolated(model, lambda model: needed_by(compiled_dev_loss(config, model, batch)))[1]


def extrapolated(model: ModelConfig, memory: Callable[[ModelConfig], tuple[int, int]]) -> tuple[int, int]:
    """Return the memory of a program of a deep model from those of a model of two layers and of three.

    Each further layer is assumed to add as much as the third one.
    """
    if model.n_layer <= 3:
        return memory(model)
    two, three = (memory(dataclasses.replace(model, n_layer=n)) for n in (2, 3))
    state, work = (int(b + (model.n_layer - 3) * (b - a)) for a, b in zip(two, three, strict=True))
    return state, work


def compiled_memory(config: TrainConfig, model: ModelConfig, shape: Shape) -> tuple[int, int]:
    """Return the same as `training_memory`, by compiling the model with all its layers."""
    return needed_by(compiled_update(config, model, shape))


def needed_by(program: jax.stages.Compiled) -> tuple[int, int]:
    """Return the bytes of a program's inputs, and of what it needs besides, on each device."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def compiled_update(config: TrainConfig, model: ModelConfig, shape: Shape) -> jax.stages.Compiled:
    """Compile an update on the config's mesh from shapes alone; no array is made."""
    mesh = make_mesh(mesh_sizes(config.mesh))
    base = abstract_base(config, model, mesh)
    arrays = abstract_state(config, base), learning_rate(config, config.n_training_steps)
    state, rate = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), arrays)
    update: Any = make_update(config.adamw, RECIPES[config.recipe], mesh)
    return update.lower(state, rate, FrozenBase.of(base), abstract_batch(config, mesh, shape)).compile()


def compiled_dev_loss(config: TrainConfig, model: ModelConfig, batch: Batch) -> jax.stages.Compiled:
    """Compile the loss of a batch [rows, columns] of the dev set, from its shape alone."""
    mesh = make_mesh(mesh_sizes(config.mesh))
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split_rows(mesh, axis=0)), batch)
    axes = (model.n_layer, 2, config.prefix_seq_len, model.n_head, model.head_dim)
    prefix = jax.ShapeDtypeStruct(axes, jnp.float32, sharding=replicated(mesh))
    return loss_on_mesh.lower(abstract_base(config, model, mesh), prefix, rows, mesh).compile()


def abstract_base(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> BaseModel:
    """Return the base model as it lies on the mesh, with shapes in place of weights."""
    place = base_sharding(mesh, model.n_head)

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name, shape = path_name(path), leaf.shape
        return jax.ShapeDtypeStruct(shape, held_dtype(name, shape, config.dtype), sharding=place(name, shape))

    return jax.tree.map_with_path(placed, abstract_model(model, config.compute))


def abstract_batch(config: TrainConfig, mesh: Mesh, shape: Shape) -> Batch:
    """Return the batch of an update, with shapes in place of arrays."""

    def rows(*axes: int) -> Any:
        return jax.ShapeDtypeStruct((config.n_accum_steps, *axes), jnp.int32, sharding=split_rows(mesh))

    whole = rows(shape.n_rows, shape.n_columns)
    packing = labelled = None
    if isinstance(shape, PackedShape):
        packing = Packing(tuple(rows(shape.n_rows, *size) for size in shape.classes), whole)
    if shape.n_labels is not None:
        labelled = Packing((rows(shape.n_rows, 1, shape.n_labels),), whole)
    return Batch(whole, whole, packing, labelled)
