"""The training loop: one update after another, and after each what is due: log, save, stop, evaluate."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from signal import Signals
from typing import NamedTuple

from jax.sharding import Mesh

from convert.errors import RunError
from convert.prefix import PREFIX_FOLDER
from jaxprefix.config import TrainConfig
from jaxprefix.data.batches import Batch
from jaxprefix.data.shapes import Shape
from jaxprefix.inputs import Inputs, update_batches
from jaxprefix.machine.hosts import Verdict, Vote, Watchdog, is_first, spread
from jaxprefix.metrics import LossMeter, dev_batches, evaluation_batches, loss_and_ppl
from jaxprefix.models import BaseModel
from jaxprefix.prefix import prefix_of, save_prefix
from jaxprefix.recipe import RECIPES
from jaxprefix.run.checkpoint import Checkpoints
from jaxprefix.run.faults import FiniteGuard, StopRequest, check_still_there, what_is_left
from jaxprefix.run.log import RunLog
from jaxprefix.run.progress import Progress
from jaxprefix.sharding import split_rows
from jaxprefix.update import FrozenBase, LearningRate, Outcome, TrainState, Update, n_applied


class Run(NamedTuple):
    """What stays the same while a run goes on."""

    config: TrainConfig
    inputs: Inputs
    base: BaseModel
    mesh: Mesh
    shapes: Sequence[Shape]
    update: Update
    rate: LearningRate
    log: RunLog
    checkpoints: Checkpoints | None
    watchdog: Watchdog


def loop(run: Run, state: TrainState, progress: Progress, stop: StopRequest) -> Signals | None:
    """Make the remaining updates; after each, log, save, stop and evaluate as due. Updates `progress` in place.

    Returns the signal that ended the loop early, if one did. Raises RunError for numbers that are not finite.
    """
    config, plan, vote = run.config, run.inputs.plan, Vote(run.mesh)
    batches = (
        (batch.n_labels, spread(batch, split_rows(run.mesh)))
        for batch in update_batches(config, run.inputs, run.shapes, progress.n_done)
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

        late = time.monotonic() - saved_at > 60 * config.checkpoint_every_minutes
        verdict = vote.cast(Verdict(late, stop.received))
        epoch_ends = plan.ends_epoch(progress.n_done)
        logging = batch is None or progress.n_done % config.log_every_n_steps == 0
        stopping = verdict.stop is not None and batch is not None
        saving = epoch_ends or stopping or verdict.save or progress.n_done % config.checkpoint_every_n_steps == 0
        if saving or late:  # several processes vote with a delay of one update; a late one must not ask again meanwhile
            saved_at = time.monotonic()

        in_flight.settle(state, n_left=0 if logging or saving else 1)
        if logging:
            log_training(run, state, progress.n_done, epoch, in_flight.window)
            in_flight.window = LossMeter(RECIPES[config.recipe])
        if saving and run.checkpoints:  # begins before an evaluation, which may take a while
            progress.window, progress.n_skipped = in_flight.window.sums, in_flight.guard.n_skipped
            progress.to_evaluate = epoch_ends
            save(run, state, progress)
        if stopping:  # a resumed run begins with the evaluation
            return verdict.stop
        if epoch_ends:
            evaluate(run, state, progress, epoch)
        if saving:
            in_flight.clock = time.monotonic()  # evaluating and saving are not training
            run.watchdog.still_going()
    return None


class InFlight:
    """Updates that the device may still be working on; as each ends, in order, its loss enters the log's window."""

    def __init__(self, run: Run, progress: Progress):
        """Continue a checkpoint's window, and its count of updates skipped in a row."""
        self._run = run
        self._updates: deque[tuple[int, Outcome, int]] = deque()
        self.window = LossMeter(RECIPES[run.config.recipe], progress.window)
        self.guard = FiniteGuard(run.config, progress.n_skipped)
        self.clock = time.monotonic()
        """When the time of the next update begins to count."""

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
                causes = f"--max_lr {run.config.max_lr:g} is too high, or one of these examples is the cause"
                left = what_is_left(run.config, resumable=False)
                raise RunError.all(f"{fault}; {left}. Either {causes}:", examples)
            if math.isfinite(loss):  # else it would spoil the window's mean; float16 has skipped that update
                self.window.add(loss, n_labels, self.clock - started)
            run.log.move_bar(number, loss, self.window.tokens_per_s)
            run.watchdog.still_going()


def log_training(run: Run, state: TrainState, n_done: int, epoch: int, window: LossMeter) -> None:
    """Write a log point: means over the updates since the last one."""
    applied, values = n_applied(state), window.means()
    values |= {"lr": float(run.rate(max(applied - 1, 0))), "tokens_per_s": window.tokens_per_s}
    if state.loss_scale is not None:
        values["skipped"] = n_done - applied
    run.log.point("train", n_done, epoch, **values)


def save(run: Run, state: TrainState, progress: Progress) -> None:
    """Save a checkpoint, once metrics.jsonl is on the disk up to the checkpoint's last update."""
    assert run.checkpoints is not None
    run.checkpoints.finish()  # before the check, since the folder may vanish in the meantime
    check_still_there(run.config)
    run.log.to_disk()
    run.checkpoints.save(progress.n_done, state, progress.to_save())


def evaluate(run: Run, state: TrainState, progress: Progress, epoch: int) -> None:
    """Measure the prefix on the dev set, and save it if its loss is the lowest so far."""
    prefix, inputs, recipe = prefix_of(state.encoder), run.inputs, RECIPES[run.config.recipe]

    def batches() -> Iterator[Batch]:
        for batch in dev_batches(run.config, inputs, run.mesh):
            run.watchdog.still_going()
            yield batch

    metrics = loss_and_ppl(run.base, prefix, batches(), run.mesh, recipe)
    progress.to_evaluate = False
    run.log.point("dev", progress.n_done, epoch, **metrics)
    loss = metrics["loss"]
    if not math.isfinite(loss):
        return
    progress.has_prefix = True
    if progress.best_dev_loss is not None and loss >= progress.best_dev_loss:
        return
    progress.best_dev_loss = loss
    if run.checkpoints:
        run.checkpoints.finish()  # a prefix/ without a checkpoint is a sign that those were removed
        if is_first():
            check_still_there(run.config)
            folder, base = run.config.run_dir / PREFIX_FOLDER, inputs.base
            save_prefix(folder, prefix, base.config, base.tokenizer, loss)


def offending_examples(run: Run, state: TrainState, update: int) -> list[str]:
    """Describe those of an update's examples whose loss, alone, is not finite; if there are none, all of them."""
    train_set, tokenizer = run.inputs.train_set, run.inputs.base.tokenizer
    numbers = [number for batch in run.inputs.plan.micro_batches(update - 1) for number in batch]
    examples, prefix = [train_set[number] for number in numbers], prefix_of(state.encoder)
    lines, offending = [], []
    for number, (prompt, target), alone in zip(
        numbers, examples, evaluation_batches(examples, tokenizer, 1, run.mesh), strict=True
    ):
        where = f"{run.config.data_filepath}, line {train_set.line_numbers[number]}"
        lines.append(f"{where}: {tokenizer.decode(prompt + target)[:50]!r}")
        if not math.isfinite(loss_and_ppl(run.base, prefix, [alone], run.mesh)["loss"]):
            offending.append(lines[-1])
        run.watchdog.still_going()
    return offending or lines
