"""Train a prefix: read → load → start the prefix → jitted update → loop. Legend: `models/attention.py`."""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from convert.errors import RunError
from convert.prefix import RUN_SUBFOLDER
from jaxprefix.batches import Batch
from jaxprefix.checkpoint import Checkpoints, newest_checkpoint
from jaxprefix.config import TrainConfig, mesh_sizes
from jaxprefix.data import label_counts, max_rows_per_example, row_lengths
from jaxprefix.devices import own_device
from jaxprefix.faults import (
    FiniteGuard,
    StopRequest,
    check_still_there,
    less_memory,
    stop_on_signal,
    what_is_left,
    within_disk,
)
from jaxprefix.hosts import (
    Vote,
    Watchdog,
    agree,
    agree_first,
    broadcast_from_first,
    check_same,
    is_first,
    joined,
    spread,
)
from jaxprefix.inputs import Inputs, read_inputs, update_batches
from jaxprefix.memory import within_memory
from jaxprefix.metrics import LossMeter, dev_batches, dev_loss
from jaxprefix.models import BaseModel, fingerprint, load_model
from jaxprefix.prefix import Encoder, base_identity, prefix_of, save_prefix
from jaxprefix.recipe import RECIPES
from jaxprefix.run_description import common_settings, describe_run
from jaxprefix.run_folder import CHECKPOINTS, check_run_folder, open_shared_folder
from jaxprefix.run_lock import lock_shared_folder
from jaxprefix.run_log import RunLog
from jaxprefix.sharding import base_sharding, make_mesh, n_row_parts, replicated, split_rows
from jaxprefix.start import Progress, abstract_state, earlier_arrays, restore_state, start_encoder
from jaxprefix.update import (
    FrozenBase,
    LearningRate,
    Outcome,
    TrainState,
    Update,
    first_state,
    learning_rate,
    make_update,
    n_applied,
)


class Run(NamedTuple):
    """What stays the same while a run goes on."""

    config: TrainConfig
    inputs: Inputs
    base: BaseModel
    mesh: Mesh
    update: Update
    rate: LearningRate
    log: RunLog
    checkpoints: Checkpoints | None
    watchdog: Watchdog


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run_dir: Path
    n_done: int
    best_dev_loss: float | None
    stopped_by: Signals | None
    """The signal that ended the run before its last update."""

    @property
    def finished(self) -> bool:
        """Tell whether all updates were made."""
        return self.stopped_by is None


def train(config: TrainConfig) -> TrainResult:
    """Train a prefix; `config.run_dir` holds everything afterwards, the best prefix in its `prefix/`.

    Raises InputError for anything wrong with the user's input, before anything is written, and RunError when numbers
    that are not finite, the disk or the memory end a run that has begun. SIGINT, SIGTERM and SIGHUP end it after the
    current update, with a checkpoint; a second signal ends it at once. One of many processes (`config.hosts`) returns
    when all of them are done; a signal to any of them ends the run for all.
    """
    with within_memory(lambda: less_memory(config)), joined(config.hosts):
        return train_jointly(config)


def train_jointly(config: TrainConfig) -> TrainResult:
    """Make the run that `train` describes, in a process that has joined the others."""
    inputs = agree("read its inputs", lambda: read_inputs(config))
    mesh = make_mesh(mesh_sizes(config.mesh))
    identity = base_identity(inputs.base.config, inputs.base.tokenizer)
    description = checked_description(config, inputs, identity)
    with contextlib.ExitStack() as stack:
        lock_shared_folder(config, stack)  # nobody else writes from here on
        place = base_sharding(mesh, inputs.base.config.n_head)
        base = agree(
            "load the base",
            lambda: load_model(inputs.base.path, config.dtype, place, inputs.base.config, config.compute),
        )
        rate = jax.device_put(learning_rate(config, inputs.plan.n_updates), replicated(mesh))
        resuming = has_checkpoint(config)
        earlier = None if resuming else earlier_arrays(config, identity)

        def start() -> TrainState:
            if resuming:
                return abstract_state(config, base)
            return first_state(config, start_encoder(config, base, inputs.base.tokenizer, earlier))

        state = agree("start the prefix", start)
        progress = Progress()
        if config.writes:
            stack.enter_context(within_disk(config))
        stop = stack.enter_context(stop_on_signal(config))
        checkpoints = stack.enter_context(Checkpoints(config.run_dir / CHECKPOINTS)) if config.save_model else None
        if checkpoints and resuming:
            state, progress = restore_state(config, checkpoints, state, inputs.plan.n_updates)
        open_shared_folder(config, description)
        state = jax.device_put(state, replicated(mesh))
        log = stack.enter_context(agree("open the log", lambda: open_log(config, inputs.plan.n_updates, progress)))
        for line in summary(config, inputs, state.encoder, mesh):
            log.line(line)
        if progress.n_done:
            log.line(f"resumed after update {progress.n_done}")
        update = make_update(config, mesh)
        watchdog = stack.enter_context(Watchdog(config.hosts.stall_minutes))
        run = Run(config, inputs, base, mesh, update, rate, log, checkpoints, watchdog)
        stopped_by = loop(run, state, progress, stop)
        if stopped_by is not None:
            advice = "; repeat the command with --resume to go on" if checkpoints else ", without a checkpoint"
            log.line(f"stopped after update {progress.n_done}{advice}")
    return TrainResult(config.run_dir, progress.n_done, progress.best_dev_loss, stopped_by)


def checked_description(config: TrainConfig, inputs: Inputs, identity: dict[str, str]) -> dict[str, Any]:
    """Return the content of config.json, once it is the same on all processes and the run may have its folder."""
    weights = agree("read the weights", lambda: fingerprint(inputs.base.path, inputs.base.config))
    description = agree("describe the run", lambda: describe_run(config, identity | {"weights": weights}))
    agree("have process 0's settings", lambda: check_same(common_settings(config, description)))
    if config.writes:  # before minutes go by
        agree_first("check the run's folder", lambda: check_run_folder(config, description))
    return description


class InFlight:
    """Updates that the device may still be working on; as each ends, in order, its loss enters the log's window."""

    def __init__(self, run: Run, progress: Progress):
        """Continue the window, and the count of updates skipped in a row, of a checkpoint."""
        self._run = run
        self._updates: deque[tuple[int, Outcome, int]] = deque()
        self.window = LossMeter(RECIPES[run.config.recipe], progress.window)
        self.guard = FiniteGuard(run.config, progress.n_skipped)
        self.clock = time.monotonic()
        """When the last update ended."""

    def add(self, number: int, outcome: Outcome, n_labels: int) -> None:
        """Take in an update that was started."""
        self._updates.append((number, outcome, n_labels))

    def settle(self, state: TrainState, n_left: int) -> None:
        """Wait until only n_left updates are in flight. Raises RunError for one that `FiniteGuard` objects to."""
        run = self._run
        while len(self._updates) > n_left:
            number, outcome, n_labels = self._updates.popleft()
            loss, started = float(outcome.loss), self.clock  # waits for the device
            self.clock = time.monotonic()
            if fault := self.guard.fault(number, loss, float(outcome.gradient_norm)):
                if run.checkpoints:
                    run.checkpoints.finish()
                examples = offending_examples(run, state, number)
                raise RunError.all(f"{fault}; {what_is_left(run.config)}. It comes from:", examples)
            self.window.add(loss, n_labels, self.clock - started)
            run.log.progress(number, loss, self.window.tokens_per_s)
            run.watchdog.progress()


def loop(run: Run, state: TrainState, progress: Progress, stop: StopRequest) -> Signals | None:
    """Make the remaining updates; log, evaluate and save when due. Updates `progress` in place.

    Returns the signal that ended the loop early, if one did. Raises RunError for numbers that are not finite.
    """
    config, plan, vote = run.config, run.inputs.plan, Vote(run.mesh)
    batches = (
        (batch.n_labels, spread(batch, split_rows(run.mesh)))
        for batch in update_batches(config, run.inputs, run.mesh, progress.n_done)
    )
    batch, base = next(batches, None), FrozenBase.of(run.base)
    if progress.to_evaluate:
        evaluate(run, state, progress, plan.epoch_of(progress.n_done - 1))
    in_flight, saved_at = InFlight(run, progress), time.monotonic()
    while batch is not None:
        (n_labels, arrays), epoch = batch, plan.epoch_of(progress.n_done)
        state, outcome = run.update(state, run.rate, base, arrays)
        progress.n_done += 1
        in_flight.add(progress.n_done, outcome, n_labels)
        batch = next(batches, None)  # laid out and transferred while the device is busy
        epoch_ends = plan.ends_epoch(progress.n_done)
        logging = progress.n_done % config.log_every_n_steps == 0 or batch is None
        due = time.monotonic() - saved_at > 60 * config.checkpoint_every_minutes
        wish = Vote.SAVE if due else Vote.GO_ON
        verdict = vote.cast(wish if stop.received is None else Vote.SAVE + stop.received)
        saving = epoch_ends or verdict > Vote.GO_ON or progress.n_done % config.checkpoint_every_n_steps == 0
        saved_at = time.monotonic() if saving or due else saved_at
        in_flight.settle(state, n_left=0 if logging or saving else 1)

        if logging:
            log_training(run, state, progress.n_done, epoch, in_flight.window)
            in_flight.window = LossMeter(RECIPES[config.recipe])
        if run.checkpoints and saving:  # begins before an evaluation, which may take long
            progress.window, progress.n_skipped = in_flight.window.sums, in_flight.guard.n_skipped
            progress.to_evaluate = epoch_ends
            save(run, state, progress)
        if verdict > Vote.SAVE and batch is not None:
            return Signals(verdict - Vote.SAVE)
        if epoch_ends:
            evaluate(run, state, progress, epoch)
        if saving:
            in_flight.clock = time.monotonic()  # evaluating and saving is not training
            run.watchdog.progress()
    return None


def log_training(run: Run, state: TrainState, n_done: int, epoch: int, window: LossMeter) -> None:
    """Write a point of the log: means over the updates since the last one."""
    applied, values = n_applied(state), window.means()
    values |= {"lr": float(run.rate(max(applied - 1, 0))), "tokens_per_s": window.tokens_per_s}
    if state.loss_scale is not None:
        values["skipped"] = n_done - applied
    run.log.point("train", n_done, epoch, **values)


def evaluate(run: Run, state: TrainState, progress: Progress, epoch: int) -> None:
    """Measure the prefix on the dev set, and save it if its loss is the lowest so far."""
    prefix, inputs, recipe = prefix_of(state.encoder), run.inputs, RECIPES[run.config.recipe]
    packing = run.config.packing and not recipe.average_batch_means

    def batches() -> Iterator[Batch]:
        for batch in dev_batches(inputs.dev_set, inputs.base.tokenizer, run.config.batch_size, run.mesh, packing):
            run.watchdog.progress()
            yield batch

    metrics = dev_loss(run.base, prefix, batches(), recipe, run.mesh)
    progress.to_evaluate = False
    run.log.point("dev", progress.n_done, epoch, **metrics)
    loss = metrics["loss"]
    if math.isfinite(loss) and (progress.best_dev_loss is None or loss < progress.best_dev_loss):
        progress.best_dev_loss = loss
        if run.config.save_model and is_first():
            check_still_there(run.config)
            save_prefix(run.config.run_dir / RUN_SUBFOLDER, prefix, inputs.base.config, inputs.base.tokenizer)


def save(run: Run, state: TrainState, progress: Progress) -> None:
    """Save a checkpoint, once metrics.jsonl is on the disk up to the checkpoint's last update."""
    assert run.checkpoints is not None
    run.checkpoints.finish()  # before the check, since the folder may vanish in the meantime
    check_still_there(run.config)
    run.log.to_disk()
    run.checkpoints.save(progress.n_done, state, dataclasses.asdict(progress))


def offending_examples(run: Run, state: TrainState, update: int) -> list[str]:
    """Describe the examples of an update whose loss is not finite; all of them if each alone has a finite one."""
    numbers = [number for batch in run.inputs.plan.micro_batches(update - 1) for number in batch]
    examples = [run.inputs.train_set[number] for number in numbers]
    tokenizer, prefix = run.inputs.base.tokenizer, prefix_of(state.encoder)
    lines, offending = [], []
    for number, (prompt, target), alone in zip(
        numbers, examples, dev_batches(examples, tokenizer, 1, run.mesh), strict=True
    ):
        lines.append(f"example {number + 1} of the data: {tokenizer.decode(prompt + target)[:50]!r}")
        if not math.isfinite(dev_loss(run.base, prefix, [alone], mesh=run.mesh)["loss"]):
            offending.append(lines[-1])
        run.watchdog.progress()
    return offending or lines


def has_checkpoint(config: TrainConfig) -> bool:
    """Tell whether the run resumes from a checkpoint."""
    return bool(broadcast_from_first(config.resume and newest_checkpoint(config.run_dir / CHECKPOINTS) is not None))


def open_log(config: TrainConfig, n_updates: int, progress: Progress) -> RunLog:
    """Open the log at the run's progress; of many processes, only the first one writes and prints."""
    folder = config.run_dir if config.save_log and is_first() else None
    return RunLog(folder, n_updates, progress.n_done, progress.to_evaluate, quiet=not is_first())


def summary(config: TrainConfig, inputs: Inputs, encoder: Encoder, mesh: Mesh) -> Iterator[str]:
    """Yield the lines that say what is about to be trained, on what, and what looks wrong."""
    model, plan = inputs.base.config, inputs.plan
    n_trainable = sum(leaf.size for leaf in jax.tree.leaves(encoder))
    n_bytes = config.prefix_seq_len * model.folded_width * 4
    n_labels = label_counts(inputs.train_set).sum()
    devices = f"{mesh.size} device(s), {own_device().device_kind}"
    yield f"base model {model.name}: {model.n_layer} layers × {model.n_embd}, {config.dtype}, {devices}"
    yield f"prefix: {n_trainable:,} trainable parameters; folded, {config.prefix_seq_len} positions, {n_bytes:,} bytes"
    yield f"data: {plan.n_examples:,} examples, {n_labels:,} tokens per epoch; dev {len(inputs.dev_set):,} examples"
    yield from inputs.train_set.report_unknown(inputs.base.tokenizer.unk_id)
    yield from inputs.train_set.skipped.report(config.data_filepath)
    yield f"training: {plan.n_updates:,} updates, {config.batch_size} × {config.n_accum_steps} examples each"
    if (n_parts := n_row_parts(mesh)) > config.batch_size * max_rows_per_example(row_lengths(inputs.train_set)):
        yield f"WARNING: rows are split over {n_parts} devices, which --batch_size {config.batch_size} does not fill"
    if inputs.base.tokenizer.unk_id in inputs.base.tokenizer.encode(config.suffix):
        yield f"WARNING: the suffix {config.suffix!r} holds an unknown token for this tokenizer; it cannot be learnt"
