"""Train a prefix as the original does, with or without DeepSpeed, on one or several ranks.

deepspeed --module torch_ref.train --deepspeed --pretrained_model_dir …
torchrun --nproc_per_node 2 -m torch_ref.train --pretrained_model_dir …
python -m torch_ref.train --pretrained_model_dir …
"""

import argparse
import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from torch_ref.config import train_parser, write_deepspeed_config
from torch_ref.data import Example, collate, read_chunks, split_examples
from torch_ref.models import load_base
from torch_ref.prefix import PrefixEncoder, base_keys_values, filled_cache, fit
from torch_ref.run_log import RunLog, is_first_rank
from torch_ref.tokenizer import Tokenizer, load_tokenizer
from torch_ref.update import DeepSpeedSteps, PlainSteps, Steps, load_moments, read_state, write_state

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class Record:
    """What happened in a run, for the comparison with jaxprefix."""

    encoder: PrefixEncoder
    n_done: int
    """Updates, including those of --checkpoint_path."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of every micro-batch."""
    rates: list[float] = dataclasses.field(default_factory=list)
    """The learning rate of every update."""
    dev: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """(monitor, ppl) of every epoch."""


class Run(NamedTuple):
    """What stays the same while a run goes on, and the record of what happened."""

    flags: argparse.Namespace
    base: PreTrainedModel
    encoder: PrefixEncoder
    steps: Steps
    pad_id: int
    log: RunLog
    record: Record


def batch_loss(base: PreTrainedModel, keys_values: torch.Tensor, batch: Batch, pad_id: int) -> torch.Tensor:
    """Return the cross entropy averaged over all labels that are not pad. No attention mask is passed."""
    inputs, labels = (part.to(base.device) for part in batch)
    logits = base(inputs, past_key_values=filled_cache(keys_values.to(base.dtype))).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=pad_id)


def autocast(flags: argparse.Namespace) -> torch.autocast:
    """Return a half-precision context for passes outside DeepSpeed's engine; inactive without CUDA."""
    dtype = torch.bfloat16 if flags.bf16 else torch.float16
    return torch.autocast("cuda", dtype=dtype, enabled=torch.cuda.is_available())


def epoch_order(n_examples: int, seed: int, epoch: int) -> list[int]:
    """Return this rank's examples in a fresh random order: a permutation, or a DistributedSampler's share."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        numbers: Any = range(n_examples)
        sampler = torch.utils.data.DistributedSampler[int](numbers, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)
    return torch.randperm(n_examples).tolist()


def batches_of(examples: list[Example], order: list[int], batch_size: int, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Yield padded batches in the given order; the last one may be smaller."""
    for first in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[first : first + batch_size]], tokenizer)


@torch.no_grad()
def evaluate(run: Run, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return (monitor, ppl): plain means of the batches' losses and ppls, not weighted by tokens.

    Quirks: the plain means, and autocast on CUDA.
    """
    with autocast(run.flags):
        losses = [batch_loss(run.base, run.encoder(len(batch[0])), batch, run.pad_id).item() for batch in batches]
    return float(np.mean(losses)), float(np.mean(np.exp(losses)))


def start_ranks(flags: argparse.Namespace) -> torch.device:
    """Join the other ranks, if a launcher has started several, and return this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", flags.local_rank))
    device = torch.device(f"cuda:{local_rank}") if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if flags.deepspeed:
        import deepspeed

        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        if "RANK" not in os.environ:  # not under a launcher
            os.environ |= alone
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        if is_first_rank():
            write_deepspeed_config(flags)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend)
    return device


def train(
    flags: argparse.Namespace,
    order: Callable[[int, int, int], list[int]] = epoch_order,
    examples: Sequence[Example] | None = None,
) -> Record:
    """Train a prefix and return the record of it.

    `order` and `examples` replace the random order of an epoch and the documents of --data_filepath.
    """
    device = start_ranks(flags)
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(flags.seed)
    tokenizer = load_tokenizer(Path(flags.pretrained_model_dir))
    if examples is None:
        examples = [Example([], chunk) for chunk in read_chunks(Path(flags.data_filepath), tokenizer)]
    train_set, dev_set = split_examples(examples, flags.train_data_size, flags.dev_data_size)
    half = torch.float16 if flags.fp16 else torch.bfloat16 if flags.bf16 else torch.float32
    base = load_base(flags, half if flags.deepspeed else torch.float32, device)
    encoder, steps, n_done = start(flags, base)

    note = f".{flags.filename_note}" if flags.filename_note else ""
    stamp = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    stem = f"{flags.save_name}_prefix_encoder.seed{flags.seed}.{stamp}{note}"
    log = RunLog(flags, stem)
    record = Record(encoder, n_done)
    run = Run(flags, base, encoder, steps, tokenizer.pad_id, log, record)
    dev = list(batches_of(dev_set, list(range(len(dev_set))), flags.batch_size, tokenizer))
    n_to_skip, best = n_done * flags.n_accum_steps, math.inf  # batches of the updates that are done already
    for epoch in range(flags.n_epochs):
        shuffled = order(len(train_set), flags.seed, epoch)
        batches = list(batches_of(train_set, shuffled, flags.batch_size, tokenizer))
        n_skipped = min(n_to_skip, len(batches))
        n_to_skip -= n_skipped
        if n_skipped == len(batches) or record.n_done == flags.n_training_steps:
            continue
        train_epoch(run, epoch, batches[n_skipped:])
        monitor, ppl = evaluate(run, dev)
        record.dev.append((monitor, ppl))
        log.line(f"Epoch {epoch}, dev - monitor: {monitor:.5g}, ppl: {ppl:.5g}")
        log.scalars("dev", epoch, monitor=monitor, ppl=ppl)
        if flags.save_model and is_first_rank():
            torch.save(encoder.folded(), f"{stem}.checkpoint")  # quirk: it still requires grad
            if monitor < best:
                torch.save(encoder.folded(), f"{stem}.best.checkpoint")
        best = min(best, monitor)
    if flags.save_state and is_first_rank():
        write_state(Path(flags.save_state), steps, encoder, record.n_done)
    log.close()
    return record


def start(flags: argparse.Namespace, base: PreTrainedModel) -> tuple[PrefixEncoder, Steps, int]:
    """Return the encoder to train, its optimizer, and how many updates --checkpoint_path has seen, or 0."""
    encoder = PrefixEncoder.of(base, flags.prefix_seq_len, flags.prefix_input_dim, flags.prefix_hidden_dim)
    encoder.to(base.device)
    moments = None
    if flags.checkpoint_path:
        state, moments = read_state(Path(flags.checkpoint_path))
        encoder.load_state_dict(state)
    else:
        fit(encoder, base_keys_values(base, flags.prefix_seq_len).float())
    n_done = int(moments["step"]) if moments else 0
    steps = (DeepSpeedSteps if flags.deepspeed else PlainSteps)(encoder, flags, n_done)
    if moments:
        load_moments(steps, encoder, moments)
    return encoder, steps, n_done


def train_epoch(run: Run, epoch: int, batches: Sequence[Batch]) -> None:
    """Make an epoch's updates, but no more than --n_training_steps in all; log when due."""
    flags, record = run.flags, run.record
    for batch in batches:
        rate = run.steps.optimizer.param_groups[0]["lr"]
        with contextlib.nullcontext() if flags.deepspeed else autocast(flags):
            loss = batch_loss(run.base, run.steps.forward(len(batch[0])), batch, run.pad_id)
        is_update = run.steps.step(loss)
        record.losses.append(loss.item())
        run.log.window.append(loss.item())
        if not is_update:
            continue
        record.rates.append(rate)
        record.n_done += 1
        if record.n_done % flags.log_every_n_steps == 0:
            run.log.train_point(epoch, record.n_done, rate)
        if record.n_done == flags.n_training_steps:
            return


if __name__ == "__main__":
    train(train_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
