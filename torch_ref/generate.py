"""The original's prompt loop: one line in, prompt and continuation out.

python -m torch_ref.generate --pretrained_model_dir BASE --prefix_checkpoint_path FILE.weight
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from torch_ref.config import generate_parser
from torch_ref.models import load_base
from torch_ref.prefix import filled_cache, to_rows
from torch_ref.tokenizer import load_tokenizer


def load_prefix(path: Path, base: PreTrainedModel) -> torch.Tensor:
    """Read a saved prefix, folded or [P, 2·L, N, H], as keys and values [L·2, 1, N, P, H]."""
    folded = torch.load(path, map_location="cpu", weights_only=True).detach().float()
    config = base.config
    return to_rows(folded.flatten(1)[None], config.num_hidden_layers, config.num_attention_heads)


def nucleus_probabilities(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return the probabilities left after the original's filter.

    Quirk: the token whose cumulative probability exceeds top_p is dropped, unless it is the first.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p:
        ordered, order = logits.sort(descending=True, dim=-1)
        outside = ordered.softmax(-1).cumsum(-1) > top_p
        outside[..., 0] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits.softmax(-1)


def choose_token(logits: torch.Tensor, flags: argparse.Namespace) -> torch.Tensor:
    """Choose the next token of every row [rows, 1] by the decoding method."""
    if flags.decode_method == "greedy":
        return logits.argmax(-1, keepdim=True)
    if flags.decode_method == "sample":
        return torch.multinomial(logits.softmax(-1), 1)
    return torch.multinomial(nucleus_probabilities(logits, flags.top_k, flags.top_p), 1)


@torch.no_grad()
def generate_ids(
    base: PreTrainedModel, prompt: Sequence[int], prefix: torch.Tensor | None, eos_id: int, flags: argparse.Namespace
) -> list[int]:
    """Continue one prompt of token ids; the end token is not returned.

    Quirk, GPT-2 only: the prompt's positions are 0, 1, …, those of new tokens length + 1, length + 2, …, although
    training counts from the prefix length. GPT-NeoX takes positions from its cache.
    """
    cache = DynamicCache() if prefix is None else filled_cache(prefix)
    tokens = torch.tensor([list(prompt)], device=base.device)
    is_gpt2 = base.config.model_type == "gpt2"
    positions = {"position_ids": torch.arange(len(prompt))[None]} if is_gpt2 else {}
    made: list[int] = []
    while len(made) < flags.max_output_len:
        logits = base(tokens, past_key_values=cache, **positions).logits[:, -1]
        tokens = choose_token(logits, flags)
        if int(tokens) == eos_id:
            break
        made.append(int(tokens))
        positions = {"position_ids": torch.tensor([[len(prompt) + len(made)]])} if is_gpt2 else {}
    return made


def main(arguments: list[str] | None = None) -> None:
    """Read prompts from the terminal until Ctrl-D or Ctrl-C."""
    flags = generate_parser().parse_args(arguments)
    base = load_base(flags)
    tokenizer = load_tokenizer(Path(flags.pretrained_model_dir))
    prefix = load_prefix(Path(flags.prefix_checkpoint_path), base) if flags.prefix_checkpoint_path else None
    if prefix is not None and prefix.shape[3] != flags.prefix_seq_len:
        raise ValueError(f"{flags.prefix_checkpoint_path}: has {prefix.shape[3]} positions, not {flags.prefix_seq_len}")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
        print(prompt + tokenizer.decode(generate_ids(base, ids, prefix, tokenizer.eos_id, flags)), flush=True)


if __name__ == "__main__":
    main()
