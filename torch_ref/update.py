"""Updates of the encoder, with and without DeepSpeed, and the training state on disk."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from torch_ref.config import deepspeed_config
from torch_ref.prefix import PrefixEncoder, parameter_groups


class PlainSteps:
    """Updates without DeepSpeed: torch's AdamW, clipping, one step of the schedule per update.

    Quirk: a micro-batch's loss is not divided by the number of micro-batches in an update.
    """

    def __init__(self, encoder: PrefixEncoder, flags: argparse.Namespace, n_done: int):
        self.encoder, self.flags = encoder, flags
        betas = (flags.adam_beta1, flags.adam_beta2)
        groups = parameter_groups(encoder, flags.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=flags.max_lr, betas=betas, eps=flags.adam_eps)
        self.scheduler = LambdaLR(self.optimizer, lr_lambda(flags, first_step=n_done))
        self.scaler = torch.amp.GradScaler("cuda", enabled=torch.cuda.is_available())
        self.forward = DistributedDataParallel(encoder) if dist.is_initialized() else encoder
        self.n_seen = 0

    def step(self, loss: torch.Tensor) -> bool:
        """Add a micro-batch's gradient; return whether that completed an update."""
        self.scaler.scale(loss).backward()
        self.n_seen += 1
        if self.n_seen % self.flags.n_accum_steps:
            return False
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.flags.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return True


class DeepSpeedSteps:
    """Updates through DeepSpeed's engine and its fused Adam.

    Quirks: the engine divides a micro-batch's loss by the number of micro-batches in an update, and steps the schedule
    after each update; this loop steps it again. At an epoch's end, the engine keeps the gradients of an
    unfinished update.
    """

    def __init__(self, encoder: PrefixEncoder, flags: argparse.Namespace, n_done: int):
        import deepspeed

        self.forward, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=encoder,
            model_parameters=parameter_groups(encoder, flags.weight_decay),
            config=deepspeed_config(flags),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lr_lambda(flags, first_step=2 * n_done)),
        )

    def step(self, loss: torch.Tensor) -> bool:
        """Add a micro-batch's gradient; return whether that completed an update."""
        self.forward.backward(loss)
        is_update = self.forward.is_gradient_accumulation_boundary()
        self.forward.step()
        if is_update:
            self.scheduler.step()
        return is_update


Steps = PlainSteps | DeepSpeedSteps


def lr_lambda(flags: argparse.Namespace, first_step: int = 0) -> Callable[[int], float]:
    """Return the learning-rate multiplier of a step: linear warmup, then linear decay to 0."""

    def multiplier(step: int) -> float:
        step += first_step
        if step < flags.n_warmup_steps:
            return step / flags.n_warmup_steps
        return max(0.0, (flags.n_training_steps - step) / max(1, flags.n_training_steps - flags.n_warmup_steps))

    return multiplier


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Read (the encoder's state dict, the optimizer's state or None) from `--checkpoint_path`.

    Quirk: the original expects a dict with the encoder's state, which it never writes; a folded prefix is refused.
    A run resumes from the {"encoder": …, "optimizer": …} that `jaxprefix convert` and `--save_state` write.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"{path}: expected a dict with the encoder's state, found {type(state).__name__}")
    return (state["encoder"], state["optimizer"]) if "encoder" in state else (state, None)


def load_moments(steps: Steps, encoder: PrefixEncoder, saved: dict[str, Any]) -> None:
    """Put Adam's moments and step count, by parameter name, into the optimizer. Float32 training only."""
    is_torch = isinstance(steps.optimizer, torch.optim.AdamW)
    for name, parameter in encoder.named_parameters():
        moments = {kind: saved[kind][name].to(parameter).clone() for kind in ("exp_avg", "exp_avg_sq")}
        count = torch.tensor(float(saved["step"])) if is_torch else int(saved["step"])
        steps.optimizer.state[parameter] = {"step": count, **moments}


def write_state(path: Path, steps: Steps, encoder: PrefixEncoder, n_done: int) -> None:
    """Write encoder, Adam's moments and the number of updates, for `jaxprefix convert`. Float32 training only."""
    moments = {
        kind: {name: steps.optimizer.state[p][kind].cpu() for name, p in encoder.named_parameters()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    encoder_state = {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"encoder": encoder_state, "optimizer": {"step": n_done, **moments}}, temporary)
    os.replace(temporary, path)
