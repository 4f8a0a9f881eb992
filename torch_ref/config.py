"""The original's command line, and the DeepSpeed config that the original makes from it."""

import argparse
import json
from pathlib import Path
from typing import Any


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of the training flags, with the original's names and defaults."""
    parser = argparse.ArgumentParser(prog="torch_ref.train", description="Train a prefix as the original does.")
    add = parser.add_argument
    add("--model_type", choices=("gpt-neox", "gpt"), default="gpt-neox")
    add("--pretrained_model_dir", required=True)
    add("--prefix_seq_len", type=int, default=10)
    add("--prefix_input_dim", type=int, default=10)
    add("--prefix_hidden_dim", type=int, default=10)
    add("--seed", type=int, default=42)
    add("--batch_size", type=int, default=4)
    add("--n_training_steps", type=int, default=50_000)
    add("--n_epochs", type=int, default=50)
    add("--n_warmup_steps", type=int, default=0)
    add("--n_accum_steps", type=int, default=1)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.99)
    add("--adam_eps", type=float, default=1e-8)
    add("--weight_decay", type=float, default=0.01)
    add("--min_lr", type=float, default=1e-6)
    add("--max_lr", type=float, default=1e-4)
    add("--grad_clip", type=float, default=1.0)
    add("--data_filepath", required=True)
    add("--train_data_size", type=int, default=1000)
    add("--dev_data_size", type=int, default=10)
    add("--checkpoint_path")
    add("--resume_training", action="store_true")
    add("--save_log", action="store_true")
    add("--save_model", action="store_true")
    add("--save_name", required=True)
    add("--log_every_n_steps", type=int, default=100)
    add("--filename_note", default="")
    add("--fp16", action="store_true")
    add("--bf16", action="store_true")
    add("--deepspeed", action="store_true")
    add("--deepspeed_config", default="ds_config.json", help="written by this program from the flags above")
    add("--local_rank", type=int, default=0)
    add("--save_state", help="ours: where to write encoder and optimizer at the end, for jaxprefix convert")
    return parser


def generate_parser() -> argparse.ArgumentParser:
    """Return the parser of the inference flags, with the original's names and defaults."""
    parser = argparse.ArgumentParser(prog="torch_ref.generate", description="Continue prompts from the terminal.")
    add = parser.add_argument
    add("--model_type", choices=("gpt-neox", "gpt"), default="gpt-neox")
    add("--pretrained_model_dir", required=True)
    add("--prefix_checkpoint_path")
    add("--prefix_seq_len", type=int, default=10)
    add("--max_output_len", type=int, default=128)
    add("--decode_method", choices=("nucleus", "greedy", "sample"), default="nucleus")
    add("--top_p", type=float, default=0.95)
    add("--top_k", type=int, default=50)
    return parser


def deepspeed_config(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the DeepSpeed settings that the flags ask for. `min_lr` is among them, without effect."""
    return {
        "train_micro_batch_size_per_gpu": flags.batch_size,
        "gradient_accumulation_steps": flags.n_accum_steps,
        "optimizer": {
            "type": "Adam",
            "params": {
                "lr": flags.max_lr,
                "betas": [flags.adam_beta1, flags.adam_beta2],
                "eps": flags.adam_eps,
                "weight_decay": flags.weight_decay,
                "adam_w_mode": True,
            },
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": flags.min_lr,
                "warmup_max_lr": flags.max_lr,
                "warmup_num_steps": flags.n_warmup_steps,
            },
        },
        "gradient_clipping": flags.grad_clip,
        "zero_optimization": {"stage": 0},
        "fp16": {"enabled": flags.fp16, "initial_scale_power": 10},
        "bf16": {"enabled": flags.bf16},
    }


def write_deepspeed_config(flags: argparse.Namespace) -> None:
    """Write the settings to the file that `--deepspeed_config` names."""
    Path(flags.deepspeed_config).write_text(json.dumps(deepspeed_config(flags), indent=2) + "\n")
