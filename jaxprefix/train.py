"""Train a prefix: read → load → start the prefix → jitted update → loop. Legend: `models/attention.py`."""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Hashable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any

import jax
from jax.sharding import Mesh

from convert.errors import PlainError
from jaxprefix.base_folder import base_identity
from jaxprefix.config import AdamW, TrainConfig, mesh_sizes
from jaxprefix.data.rows import label_counts, max_rows_per_example, row_lengths
from jaxprefix.data.shapes import Shape
from jaxprefix.inputs import Inputs, batch_shapes, read_inputs
from jaxprefix.loop import Run, loop
from jaxprefix.machine.devices import half_type, own_device
from jaxprefix.machine.hosts import Watchdog, agree, agree_first, broadcast_from_first, check_same, is_first, spread
from jaxprefix.machine.joining import joined
from jaxprefix.machine.memory import released_after_errors, within_memory
from jaxprefix.models import fingerprint, load_model
from jaxprefix.prefix import Encoder
from jaxprefix.recipe import RECIPES, Recipe
from jaxprefix.run.checkpoint import CHECKPOINTS, Checkpoints, newest_checkpoint
from jaxprefix.run.description import common_settings, describe_run
from jaxprefix.run.faults import less_memory, stop_on_signal, within_disk
from jaxprefix.run.folder import check_run_folder, open_shared_folder
from jaxprefix.run.lock import only_run
from jaxprefix.run.log import RunLog
from jaxprefix.run.progress import Progress
from jaxprefix.sharding import base_sharding, make_mesh, n_row_parts, replicated
from jaxprefix.start import restore_state, starting_state
from jaxprefix.update import Update, learning_rate, make_update


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run_dir: Path
    n_done: int
    finished: bool
    """Whether all updates were made."""
    best_dev_loss: float | None
    stopped_by: Signals | None
    """The signal that ended the run; if the run has one process, also a signal that came too late, after its end."""


def train(config: TrainConfig) -> TrainResult:
    """Train a prefix; `config.run_dir` holds everything afterwards, the best prefix in its `prefix/`.

    Raises InputError for anything wrong with the user's input, before the run's folder is changed (except that resuming
    puts damaged checkpoints aside and removes those beyond the newest two), and RunError when numbers that are not
    finite, the disk or the memory end a run that has begun. SIGINT, SIGTERM and SIGHUP end it after the current update,
    with a checkpoint; a second signal ends it at once. One of many processes (`config.hosts`) returns when all of them
    are done; a signal to any of them ends the run for all.
    """
    logs = list[RunLog]()
    try:
        with released_after_errors(), within_memory(lambda: less_memory(config)), joined(config.hosts):
            return train_jointly(config, logs)
    except PlainError as error:
        for log in logs:
            log.ended_by(error)
        raise


def train_jointly(config: TrainConfig, logs: list[RunLog]) -> TrainResult:
    """Make the run that `train` describes, in a process that has joined the others; add its log to `logs`."""
    inputs = agree("read its inputs", lambda: read_inputs(config))
    mesh = agree("make its mesh", lambda: make_mesh(mesh_sizes(config.mesh)))
    identity = base_identity(inputs.base.config, inputs.base.tokenizer)
    description = checked_description(config, inputs, identity)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run(config))  # nobody else writes from here on
        place = base_sharding(mesh, inputs.base.config.n_head)
        base = agree(
            "load the base",
            lambda: load_model(inputs.base.path, config.dtype, place, inputs.base.config, config.compute),
        )
        rate = spread(learning_rate(config, inputs.plan.n_updates), replicated(mesh))
        resuming = has_checkpoint(config)
        watchdog = stack.enter_context(Watchdog(config.hosts.stall_minutes))
        state, progress = starting_state(config, base, inputs.base.tokenizer, identity, resuming), Progress()
        if config.writes:
            stack.enter_context(within_disk(config))
        stop = stack.enter_context(stop_on_signal(config))
        checkpoints = stack.enter_context(Checkpoints(config.run_dir / CHECKPOINTS)) if config.save_model else None
        if checkpoints and resuming:
            state, progress = restore_state(config, checkpoints, state)
        open_shared_folder(config, description)
        state = spread(state, replicated(mesh))
        watchdog.still_going()
        log = stack.enter_context(agree("open the log", lambda: open_log(config, inputs.plan.n_updates, progress)))
        logs.append(log)
        for line in summary(config, inputs, state.encoder, mesh):
            log.line(line)
        if config.resume:
            log.line(f"resumed after update {progress.n_done}" if resuming else "no checkpoint: starting over")
        if config.checkpoint_path is not None:
            log.line(
                f"{config.checkpoint_path} is not read again" if resuming else f"starts from {config.checkpoint_path}"
            )
        if progress.n_done < inputs.plan.n_updates:
            log.line(f"compiling; then a line every {config.log_every_n_steps:,} update(s)")
        shapes = tuple(batch_shapes(config, inputs, mesh))
        update = shared_update(config.adamw, RECIPES[config.recipe], mesh, shapes, types_of((state, base)))
        run = Run(config, inputs, base, mesh, shapes, update, rate, log, checkpoints, watchdog)
        stopped_by = loop(run, state, progress, stop)
        if checkpoints:
            checkpoints.finish()  # errors that it raises belong in the log
        watchdog.still_going()
        if stopped_by is not None:
            advice = "; repeat the command with --resume to go on" if checkpoints else ", without a checkpoint"
            log.line(f"stopped after update {progress.n_done}{advice}")
        else:
            log.line(f"finished after update {progress.n_done}")
    finished = stopped_by is None
    if finished and jax.process_count() == 1:  # several would not all know of it
        stopped_by = stop.received
    return TrainResult(config.run_dir, progress.n_done, finished, progress.best_dev_loss, stopped_by)


@functools.lru_cache(maxsize=1)
def shared_update(adamw: AdamW, recipe: Recipe, mesh: Mesh, shapes: tuple[Shape, ...], types: Hashable) -> Update:
    """Return the update of a run; the next run in this process has it, too, unless one of these differs.

    So a sweep over learning rates compiles once. `shapes` (of batches) and `types` (of state and base) only tell runs
    apart: a sweep over anything else does not keep the programs of all its runs.
    """
    return make_update(adamw, recipe, mesh)


def types_of(arrays: Any) -> Hashable:
    """Return what programs of these arrays are compiled for."""
    leaves, structure = jax.tree.flatten(arrays)
    return structure, *map(jax.typeof, leaves)


def checked_description(config: TrainConfig, inputs: Inputs, identity: dict[str, str]) -> dict[str, Any]:
    """Return the content of config.json, once it is the same on all processes and the run may use its folder."""
    weights = agree("read the weights", lambda: fingerprint(inputs.base.path, inputs.base.config))
    description = agree("describe the run", lambda: describe_run(config, identity | {"weights": weights}))
    agree("match process 0's settings", lambda: check_same(common_settings(config, description)))
    if config.writes:  # before the minutes that loading takes
        agree_first("check the run's folder", lambda: check_run_folder(config, description))
    return description


def has_checkpoint(config: TrainConfig) -> bool:
    """Tell whether the run resumes from a checkpoint."""
    return bool(broadcast_from_first(config.resume and newest_checkpoint(config.run_dir / CHECKPOINTS) is not None))


def open_log(config: TrainConfig, n_updates: int, progress: Progress) -> RunLog:
    """Open the log at the run's progress; of many processes, only the first one writes and prints."""
    folder = config.run_dir if config.save_log and is_first() else None
    return RunLog(folder, n_updates, progress.n_done, progress.to_evaluate, quiet=not is_first())


def summary(config: TrainConfig, inputs: Inputs, encoder: Encoder, mesh: Mesh) -> Iterator[str]:
    """Yield the lines that say what is about to be trained, on what, and what looks wrong."""
    model, tokenizer, plan = inputs.base.config, inputs.base.tokenizer, inputs.plan
    n_trainable = sum(leaf.size for leaf in jax.tree.leaves(encoder))
    n_bytes = config.prefix_seq_len * model.folded_width * 4
    n_labels = label_counts(inputs.train_set).sum()
    devices = f"{mesh.size} device(s), {own_device().device_kind}" + (f", {config.mesh}" if config.mesh else "")
    yield f"run {config.run_dir}, {datetime.datetime.now().astimezone().isoformat(timespec='seconds')}"
    yield f"base model {model.name}: {model.n_layer} layers × {model.n_embd}, {config.dtype}, {devices}"
    yield f"prefix: {n_trainable:,} trainable parameters; folded, {config.prefix_seq_len} positions, {n_bytes:,} bytes"
    unused = f"; {inputs.n_unused:,} unused" if inputs.n_unused else ""
    sizes = f"{plan.n_examples:,} examples, {n_labels:,} tokens per epoch; dev {len(inputs.dev_set):,} examples{unused}"
    yield f"data: {sizes}"
    yield from inputs.train_set.report_unknown(tokenizer.unk_id)
    yield from inputs.train_set.report_eos(tokenizer.eos_id)
    yield from inputs.train_set.tally.report(config.data_filepath)
    yield f"training: {plan.n_updates:,} updates, {config.batch_size} × {config.n_accum_steps} examples each"
    if (n_parts := n_row_parts(mesh)) > config.batch_size * max_rows_per_example(row_lengths(inputs.train_set)):
        yield f"WARNING: rows are split over {n_parts} devices, too many for --batch_size {config.batch_size} to fill"
    if config.dtype == "bfloat16" and half_type() == "float16":
        yield f"WARNING: {own_device().device_kind} has no fast bfloat16 products; --fp16 is faster there"
    has_documents = inputs.train_set.tally.n_sentences > 0
    if config.suffix and has_documents and (flaw := tokenizer.why_unlearnable(config.suffix)):
        yield f"WARNING: the suffix {config.suffix!r} {flaw}; it cannot be learnt"
