"""Train a prefix as the original does, with or without DeepSpeed, on one or several ranks.

deepspeed --module torch_ref.train --deepspeed --pretrained_model_dir …
torchrun -m torch_ref.train --pretrained_model_dir …
python -m torch_ref.train --pretrained_model_dir …
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, PreTrainedModel

from torch_ref.config import train_parser, write_deepspeed_config
from torch_ref.data import Example, collate, read_chunks, split_examples
from torch_ref.prefix import PrefixEncoder, base_keys_values, filled_cache, fit, parameter_groups
from torch_ref.tokenizer import Tokenizer, load_tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]


class PlainSteps:
    """Updates without DeepSpeed: torch's AdamW, clipping, one step of the schedule per update.

    Quirk: the loss of a micro-batch is not divided by the number of accumulated ones.
    """

    def __init__(self, encoder: PrefixEncoder, flags: argparse.Namespace):
        self.encoder, self.flags = encoder, flags
        betas = (flags.adam_beta1, flags.adam_beta2)
        groups = parameter_groups(encoder, flags.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=flags.max_lr, betas=betas, eps=flags.adam_eps)
        self.scheduler = LambdaLR(self.optimizer, lr_lambda(flags))
        self.forward = DistributedDataParallel(encoder) if dist.is_initialized() else encoder
        self.n_seen = 0

    def step(self, loss: torch.Tensor) -> bool:
        """Take in a micro-batch's loss; return whether an update was made."""
        loss.backward()
        self.n_seen += 1
        if self.n_seen % self.flags.n_accum_steps:
            return False
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.flags.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return True


class DeepSpeedSteps:
    """Updates through DeepSpeed's engine and its fused Adam.

    Quirks: the engine divides a micro-batch's loss by the number of accumulated ones, and steps the schedule
    after each update; this loop steps it again. What an epoch leaves unfinished stays in the engine.
    """

    def __init__(self, encoder: PrefixEncoder, flags: argparse.Namespace):
        import deepspeed

        self.forward, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=encoder,
            model_parameters=parameter_groups(encoder, flags.weight_decay),
            config=str(write_deepspeed_config(flags)),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lr_lambda(flags)),
        )

    def step(self, loss: torch.Tensor) -> bool:
        """Take in a micro-batch's loss; return whether an update was made."""
        self.forward.backward(loss)
        is_update = self.forward.is_gradient_accumulation_boundary()
        self.forward.step()
        if is_update:
            self.scheduler.step()
        return is_update


def lr_lambda(flags: argparse.Namespace) -> Callable[[int], float]:
    """Return the learning-rate multiplier of a step: linear warmup, then linear decay to 0."""

    def multiplier(step: int) -> float:
        if step < flags.n_warmup_steps:
            return step / flags.n_warmup_steps
        return max(0.0, (flags.n_training_steps - step) / (flags.n_training_steps - flags.n_warmup_steps))

    return multiplier


def batch_loss(base: PreTrainedModel, keys_values: torch.Tensor, batch: Batch, pad_id: int) -> torch.Tensor:
    """Cross entropy averaged over all labels that are not pad. No attention mask is passed."""
    inputs, labels = (part.to(base.device) for part in batch)
    logits = base(inputs, past_key_values=filled_cache(keys_values.to(base.dtype))).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=pad_id)


def epoch_order(n_examples: int, epoch: int, seed: int) -> list[int]:
    """Return this rank's examples in a fresh random order: a permutation, or a DistributedSampler's share."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        sampler = torch.utils.data.DistributedSampler(range(n_examples), shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)
    return torch.randperm(n_examples).tolist()


def batches_of(examples: list[Example], order: list[int], batch_size: int, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Yield padded batches in the given order; the last one may be smaller."""
    for first in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[first : first + batch_size]], tokenizer)


@torch.no_grad()
def evaluate(base: PreTrainedModel, encoder: PrefixEncoder, batches: list[Batch], pad_id: int) -> tuple[float, float]:
    """Return (monitor, ppl): plain means of the batches' losses and ppls, not weighted by tokens (quirk)."""
    losses = [batch_loss(base, encoder(len(batch[0])), batch, pad_id).item() for batch in batches]
    return float(np.mean(losses)), float(np.mean(np.exp(losses)))


class Log:
    """Log lines and TensorBoard scalars; files only with --save_log, and only on rank 0."""

    def __init__(self, flags: argparse.Namespace, stem: str):
        self.started = time.monotonic()
        self.text = self.board = None
        if flags.save_log and is_first_rank():
            self.text = Path(f"{stem}.log").open("a", encoding="utf-8")  # noqa: SIM115
            self.board = SummaryWriter(f"{stem}.tensorboard")

    def line(self, text: str) -> None:
        """Print a line after the seconds since the start."""
        if is_first_rank():
            text = f"{time.monotonic() - self.started:.2f}s {text}"
            print(text, flush=True)
            if self.text:
                print(text, file=self.text, flush=True)

    def scalars(self, split: str, step: int, **values: float) -> None:
        """Write TensorBoard scalars."""
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(f"{name}/{split}", value, step)

    def close(self) -> None:
        """Close the files."""
        for file in (self.text, self.board):
            if file:
                file.close()


def is_first_rank() -> bool:
    """Tell whether this process logs and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def start_ranks(flags: argparse.Namespace) -> torch.device:
    """Join the other ranks, if a launcher has started several, and return this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", flags.local_rank))
    device = torch.device(f"cuda:{local_rank}") if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if flags.deepspeed:
        import deepspeed

        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        if "RANK" not in os.environ:  # not under a launcher
            os.environ |= alone
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def train(flags: argparse.Namespace, order: Callable[[int, int, int], list[int]] = epoch_order) -> dict[str, Any]:
    """Train a prefix and return {"losses", "rates", "dev", "encoder"}, for the comparison with jaxprefix.

    `losses` holds every micro-batch's loss, `rates` every update's learning rate, `dev` every epoch's (monitor, ppl).
    """
    device = start_ranks(flags)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(flags.seed)
    tokenizer = load_tokenizer(Path(flags.pretrained_model_dir))
    examples = [Example([], chunk) for chunk in read_chunks(Path(flags.data_filepath), tokenizer)]
    train_set, dev_set = split_examples(examples, flags.train_data_size, flags.dev_data_size)
    dtype = torch.float16 if flags.fp16 else torch.bfloat16 if flags.bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(flags.pretrained_model_dir, dtype=dtype).eval()
    base.requires_grad_(False).to(device)
    encoder = PrefixEncoder.of(base, flags.prefix_seq_len, flags.prefix_input_dim, flags.prefix_hidden_dim).to(device)
    if flags.checkpoint_path:
        # Quirk: a dict with the encoder's state is expected here, which this program never writes.
        encoder.load_state_dict(torch.load(flags.checkpoint_path, map_location=device, weights_only=True))
    else:
        fit(encoder, base_keys_values(base, flags.prefix_seq_len).float())
    steps = (DeepSpeedSteps if flags.deepspeed else PlainSteps)(encoder, flags)

    note = f".{flags.filename_note}" if flags.filename_note else ""
    stamp = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    stem = f"{flags.save_name}_prefix_encoder.seed{flags.seed}.{stamp}{note}"
    log = Log(flags, stem)
    dev = list(batches_of(dev_set, list(range(len(dev_set))), flags.batch_size, tokenizer))
    record: dict[str, Any] = {"losses": [], "rates": [], "dev": [], "encoder": encoder}
    window: list[float] = []
    n_done, best = 0, math.inf
    for epoch in range(flags.n_epochs):
        for batch in batches_of(train_set, order(len(train_set), epoch, flags.seed), flags.batch_size, tokenizer):
            rate = steps.optimizer.param_groups[0]["lr"]
            loss = batch_loss(base, steps.forward(len(batch[0])), batch, tokenizer.pad_id)
            is_update = steps.step(loss)
            record["losses"].append(loss.item())
            window.append(loss.item())
            if not is_update:
                continue
            record["rates"].append(rate)
            n_done += 1
            if n_done % flags.log_every_n_steps == 0:
                mean, ppl = float(np.mean(window)), float(np.mean(np.exp(window)))
                log.line(f"Epoch {epoch}, step {n_done}, lr {rate:.5g} - loss: {mean:.5g}, ppl: {ppl:.5g}")
                log.scalars("train", n_done, loss=mean, ppl=ppl)
                window = []
            if n_done == flags.n_training_steps:
                break
        monitor, ppl = evaluate(base, encoder, dev, tokenizer.pad_id)
        record["dev"].append((monitor, ppl))
        log.line(f"Epoch {epoch}, dev - monitor: {monitor:.5g}, ppl: {ppl:.5g}")
        log.scalars("dev", epoch, monitor=monitor, ppl=ppl)
        if flags.save_model and is_first_rank():
            torch.save(encoder.folded(), f"{stem}.checkpoint")
            if monitor < best:
                torch.save(encoder.folded(), f"{stem}.best.checkpoint")
        best = min(best, monitor)
        if n_done == flags.n_training_steps:
            break
    log.close()
    return record


if __name__ == "__main__":
    train(train_parser().parse_args())
