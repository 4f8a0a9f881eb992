"""Train a prefix: read → load → start the prefix → jitted update → loop. Legend: `models/attention.py`."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from convert.errors import InputError
from convert.training_state import read_training_state
from jaxprefix.base_folder import BaseFolder, open_base
from jaxprefix.checkpoint import Checkpoints, from_names, has_checkpoint
from jaxprefix.config import RECIPES, Recipe, TrainConfig
from jaxprefix.data import (
    IGNORED,
    Batch,
    PackedShapes,
    UpdatePlan,
    longest_row,
    make_batch,
    make_packed_batch,
    n_labels,
    split_examples,
)
from jaxprefix.evaluate import LossMeter, dev_batches, dev_loss
from jaxprefix.examples import Chunking, Example
from jaxprefix.hosts import StopVote, agree, first_says, is_first, joined, see, spread
from jaxprefix.loss import LossScale
from jaxprefix.models import BaseModel, load_model
from jaxprefix.prefix import DirectPrefix, Encoder, Prefix, base_identity, load_prefix, new_encoder, save_prefix
from jaxprefix.run_folder import CHECKPOINTS, CONFIG_FILE, check_base, open_run_folder
from jaxprefix.run_log import RunLog
from jaxprefix.sharding import base_sharding, make_mesh, replicated, rows_on, split_rows
from jaxprefix.token_cache import load_examples
from jaxprefix.tokenizer import Tokenizer
from jaxprefix.update import TrainState, Update, learning_rate, make_optimizer, make_update, n_applied

LONGEST_PACKED = 512
"""Tokens of the longest row up to which packing pays: attention over longer ones costs more than their padding."""


class Inputs(NamedTuple):
    """What a run reads before it starts, checked."""

    base: BaseFolder
    train_set: Sequence[Example]
    dev_set: Sequence[Example]
    plan: UpdatePlan


class Run(NamedTuple):
    """What stays the same while a run goes on."""

    config: TrainConfig
    inputs: Inputs
    base: BaseModel
    mesh: Mesh
    update: Update
    rate: optax.Schedule
    log: RunLog
    checkpoints: Checkpoints | None


@dataclasses.dataclass
class Progress:
    """Where a run is, besides its arrays."""

    n_done: int = 0
    best_dev_loss: float | None = None
    window: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended; unfinished means that a signal stopped it."""

    run_dir: Path
    n_done: int
    best_dev_loss: float | None
    finished: bool


def train(config: TrainConfig) -> TrainResult:
    """Train a prefix; `config.run_dir` holds everything afterwards, the best prefix in its `prefix/`.

    Raises InputError for anything wrong with the user's input, before anything is written. SIGINT and
    SIGTERM end the run after the update at hand, with a checkpoint; a second signal ends it at once. One of many
    processes (`config.hosts`) returns when all have made the run; a signal to any of them ends it for all.
    """
    with joined(config.hosts):
        return train_jointly(config)


def train_jointly(config: TrainConfig) -> TrainResult:
    """Do the same, the other processes having joined."""
    recipe = RECIPES[config.recipe]
    inputs = agree("read its inputs", lambda: read_inputs(config, recipe))
    mesh = make_mesh(config.mesh_sizes)
    wanted = (inputs.base.path, config.dtype, base_sharding(mesh), inputs.base.config, config.compute)
    base = agree("load the base", lambda: load_model(*wanted))
    rate = learning_rate(config, recipe, inputs.plan.n_updates)
    optimizer = make_optimizer(config, rate)

    resuming = first_says(config.resume and has_checkpoint(config.run_dir / CHECKPOINTS))
    state = start_state(config, base, inputs.base.tokenizer, optimizer, resuming)
    open_shared_folder(config, inputs.base)

    progress = Progress()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        checkpoints = stack.enter_context(Checkpoints(config.run_dir / CHECKPOINTS)) if config.save_model else None
        if checkpoints and resuming:
            state, saved = checkpoints.restore(state, replicated(mesh))
            progress = Progress(**saved)
        else:
            state = jax.device_put(state, replicated(mesh))
        log_folder = config.run_dir if config.save_log and is_first() else None
        log = RunLog(log_folder, inputs.plan.n_updates, progress.n_done, quiet=not is_first())
        stack.enter_context(log)
        for line in summary(config, inputs, state.encoder, mesh):
            log.line(line)
        update = make_update(optimizer, recipe, mesh)
        loop(Run(config, inputs, base, mesh, update, rate, log, checkpoints), state, progress, stop)
        finished = progress.n_done == inputs.plan.n_updates
        if not finished:
            advice = "; repeat the command with --resume to go on" if checkpoints else ", without a checkpoint"
            log.line(f"stopped after update {progress.n_done}{advice}")
    return TrainResult(config.run_dir, progress.n_done, progress.best_dev_loss, finished)


def loop(run: Run, state: TrainState, progress: Progress, stop: threading.Event) -> None:
    """Make the updates that are left; log, evaluate and save where due. Moves `progress` on."""
    config, inputs, recipe = run.config, run.inputs, RECIPES[run.config.recipe]
    dev = dev_batches(inputs.dev_set, inputs.base.tokenizer, config.batch_size)
    window = LossMeter(recipe, progress.window)
    batches = update_batches(config, inputs, run.mesh, progress.n_done)
    batch = next(batches, None)
    vote = StopVote(run.mesh)
    in_flight: deque[tuple[jax.Array, int]] = deque()  # (loss, labels) of updates the device may be working on
    clock = time.monotonic()

    def settle(n_left: int) -> None:
        """Wait until only n_left updates are in flight."""
        nonlocal clock
        while len(in_flight) > n_left:
            device_loss, n_tokens = in_flight.popleft()
            loss, before, clock = float(device_loss), clock, time.monotonic()
            window.add(loss, n_tokens, clock - before)
            run.log.progress(progress.n_done - len(in_flight), loss, window.tokens_per_s)

    while batch is not None:
        n_tokens = int((batch.labels != IGNORED).sum())
        state, device_loss = run.update(state, run.base, spread(batch, split_rows(run.mesh)))
        in_flight.append((device_loss, n_tokens))
        batch = next(batches, None)  # laid out while the device is at work
        epoch = inputs.plan.epoch_of(progress.n_done)
        progress.n_done += 1
        ended = inputs.plan.epochs_ending(progress.n_done)
        logging = progress.n_done % config.log_every_n_steps == 0
        stopping = vote.cast(stop.is_set())
        saving = ended or stopping or progress.n_done % config.checkpoint_every_n_steps == 0
        settle(n_left=0 if logging or saving else 1)

        if logging:
            applied, values = n_applied(state), window.means()
            values |= {"lr": float(run.rate(max(applied - 1, 0))), "tokens_per_s": window.tokens_per_s}
            if state.loss_scale is not None:
                values["skipped"] = progress.n_done - applied
            run.log.point("train", progress.n_done, epoch, **values)
            window = LossMeter(recipe)
        for epoch in ended:
            prefix = state.encoder()
            metrics = dev_loss(run.base, prefix, dev, recipe)
            run.log.point("dev", progress.n_done, epoch, **metrics)
            keep_best(run, prefix, metrics["loss"], progress)
        if run.checkpoints and saving:
            progress.window = window.items
            run.checkpoints.save(progress.n_done, state, dataclasses.asdict(progress))
        clock = time.monotonic() if saving else clock  # evaluating and saving is not training
        if stopping:
            return


def keep_best(run: Run, prefix: Prefix, loss: float, progress: Progress) -> None:
    """Save the prefix if its dev loss is the lowest so far."""
    if math.isfinite(loss) and (progress.best_dev_loss is None or loss < progress.best_dev_loss):
        progress.best_dev_loss = loss
        if run.config.save_model and is_first():
            save_prefix(run.config.run_dir / "prefix", prefix, run.inputs.base.config, run.inputs.base.tokenizer)


def open_shared_folder(config: TrainConfig, base: BaseFolder) -> None:
    """Let the first process open the run's folder, and the others see it."""
    identity = base_identity(base.config, base.tokenizer)
    agree("open the run's folder", lambda: open_run_folder(config, identity) if is_first() else None)
    if config.save_log or config.save_model:
        agree("see the run's folder", lambda: see(config.run_dir / CONFIG_FILE))


def read_inputs(config: TrainConfig, recipe: Recipe) -> Inputs:
    """Read configuration, tokenizer and data, and check that they fit together."""
    if config.compute.attention == "cudnn" and jax.default_backend() != "gpu":
        raise InputError("--attention cudnn needs an NVIDIA GPU, and JAX sees none")
    base = open_base(config.pretrained_model_dir, config.revision, config.model_type)
    chunking = Chunking(base.tokenizer, config.suffix, config.max_seq_len, recipe)
    examples = load_examples(config.data_filepath, chunking)
    train_set, dev_set = split_examples(examples, config.train_data_size, config.dev_data_size, config.data_filepath)
    longest = max(longest_row(train_set), longest_row(dev_set))
    base.config.check_fit(base.tokenizer.vocab_size, config.prefix_seq_len, longest, "the longest row")
    plan = UpdatePlan(
        n_examples=len(train_set),
        batch_size=config.batch_size,
        n_accum_steps=config.n_accum_steps,
        n_epochs=config.n_epochs,
        n_training_steps=config.n_training_steps,
        seed=config.seed,
        carry_accumulation=recipe.carry_accumulation,
    )
    if recipe.carry_accumulation and config.n_accum_steps > plan.batches_per_epoch:
        raise InputError(
            f"--n_accum_steps {config.n_accum_steps} is more than the {plan.batches_per_epoch} batches of an epoch, "
            f"which --recipe {config.recipe} cannot fill"
        )
    return Inputs(base, train_set, dev_set, plan)


def start_state(
    config: TrainConfig,
    base: BaseModel,
    tokenizer: Tokenizer,
    optimizer: optax.GradientTransformation,
    resuming: bool,
) -> TrainState:
    """Make the state that training starts from; only its shapes when a checkpoint is to replace it."""
    scale = LossScale.start() if config.dtype == "float16" else None
    if resuming:
        encoder = jax.eval_shape(lambda: new_encoder(base, *config.encoder_sizes, config.seed))
        return TrainState(encoder, jax.eval_shape(optimizer.init, encoder), scale)
    encoder = start_encoder(config, base, tokenizer)
    return TrainState(encoder, optimizer.init(encoder), scale)


def start_encoder(config: TrainConfig, base: BaseModel, tokenizer: Tokenizer) -> Encoder:
    """Make the encoder that training starts from: fitted to the base model, or another run's."""
    if config.checkpoint_path is None:
        return new_encoder(base, *config.encoder_sizes, config.seed)
    if config.prefix_hidden_dim == 0:
        prefix = load_prefix(config.checkpoint_path, base.config, tokenizer)
        if prefix.shape[2] != config.prefix_seq_len:
            raise InputError(
                f"{config.checkpoint_path}: has prefix length {prefix.shape[2]}, not --prefix_seq_len "
                f"{config.prefix_seq_len}"
            )
        return DirectPrefix(prefix)
    like = {"encoder": jax.eval_shape(lambda: new_encoder(base, *config.encoder_sizes, config.seed))}
    if config.checkpoint_path.is_file():  # the original's: a torch file with the encoder's state
        return from_names(like, read_training_state(config.checkpoint_path), config.checkpoint_path)["encoder"]
    check_base(config.checkpoint_path, base_identity(base.config, tokenizer))
    with Checkpoints(config.checkpoint_path / CHECKPOINTS, create=False) as checkpoints:
        return checkpoints.restore(like, replicated(make_mesh()))[0]["encoder"]


def update_batches(config: TrainConfig, inputs: Inputs, mesh: Mesh, first: int) -> Iterator[Batch]:
    """Yield every update's batch from `first` on: [micro-batches, rows, columns] of one shape, or of four if packed."""
    plan, tokenizer, n_columns = inputs.plan, inputs.base.tokenizer, longest_row(inputs.train_set)
    make, n_rows, shapes = make_batch, rows_on(mesh, 2 * config.batch_size), None
    if config.packing and n_columns <= LONGEST_PACKED and config.compute.attention != "cudnn":
        every_batch = (batch for number in range(plan.n_updates) for batch in plan.micro_batches(number))
        shapes = PackedShapes.of(inputs.train_set, every_batch, n_parts=rows_on(mesh, 1))
        make, n_rows = make_packed_batch, shapes.n_rows
    for number in range(first, plan.n_updates):
        groups = [[inputs.train_set[i] for i in group] for group in plan.micro_batches(number)]
        groups += [[]] * (config.n_accum_steps - len(groups))
        if shapes:
            n_columns = shapes.fitting(groups)
        parts = [make(group, tokenizer, n_rows, n_columns) for group in groups]
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def summary(config: TrainConfig, inputs: Inputs, encoder: Encoder, mesh: Mesh) -> Iterator[str]:
    """Yield the lines that tell what is about to be trained, on what, and what looks wrong."""
    model, plan = inputs.base.config, inputs.plan
    n_trainable = sum(leaf.size for leaf in jax.tree.leaves(encoder))
    n_bytes = config.prefix_seq_len * model.folded_width * 4
    n_tokens = int(n_labels(inputs.train_set).sum())
    yield f"base model {model.name}: {model.n_layer} layers × {model.n_embd}, {config.dtype}, {mesh.size} device(s)"
    yield f"prefix: {n_trainable:,} trainable parameters; folded, {config.prefix_seq_len} positions, {n_bytes:,} bytes"
    yield f"data: {plan.n_examples:,} examples, {n_tokens:,} tokens per epoch; dev {len(inputs.dev_set):,} examples"
    yield f"training: {plan.n_updates:,} updates, {config.batch_size} × {config.n_accum_steps} examples each"
    if inputs.base.tokenizer.unk_id in inputs.base.tokenizer.encode(config.suffix):
        yield f"WARNING: the suffix {config.suffix!r} holds an unknown token for this tokenizer; it cannot be learnt"


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Set the event at the first SIGINT or SIGTERM; raise KeyboardInterrupt at the second."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
