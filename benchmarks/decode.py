"""Decoding speed: greedy tokens per second after a prefix, against PEFT on transformers' generate.

python -m benchmarks.decode --shape 110m --rows 1 16 --new_tokens 128 --dtype float32

Both continue the same random prompts of 16 tokens with the same prefix, never stop early, and decode in turn; ratios
are medians over turns. The limit is reading all weights but the embedding's once per token, at the bandwidth
that summing the rows of a large array reaches.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import Turn, peak_device_memory, peak_memory, platform_of, take_turns
from benchmarks.report import add_turns, gib, largest, median, publish, ratio, table, turns_title
from benchmarks.shapes import SHAPES, make_folder, model_config
from convert.prefix import write_adapter

PROMPT, PREFIX = 16, 10
READ_ROWS = {"cpu": 256, "gpu": 2048}
"""Rows of 1 MiB to read: more than any cache holds, and enough to keep a GPU busy far longer than a call takes."""
Ids = list[list[int]]


def prompts(folder: Path, n_rows: int) -> np.ndarray:
    """Return random token ids [rows, PROMPT]."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(1).integers(4, min(vocab, 400), (n_rows, PROMPT))


def jaxprefix_decoder(folder: Path, n_rows: int, n_new: int, dtype: str) -> Callable[[], Ids]:
    """Return a function that decodes once, and returns the new ids of every row."""
    from jaxprefix import load_model, load_prefix, load_tokenizer
    from jaxprefix.decode import generate_ids
    from jaxprefix.inference_config import DecodeConfig
    from jaxprefix.machine.compiling import prepare_compiling

    prepare_compiling()
    model = load_model(folder, dtype)
    prefix = load_prefix(folder / "prefix", model.config)
    endless = dataclasses.replace(load_tokenizer(folder), eos_id=-1)  # no token has this id
    decode = DecodeConfig(decode_method="greedy", max_output_len=n_new)
    rows = prompts(folder, n_rows).tolist()
    return lambda: list(generate_ids(model, endless, rows, prefix, batch_size=n_rows, decode=decode))


def peft_decoder(folder: Path, n_rows: int, n_new: int, dtype: str, compiled: bool = False) -> Callable[[], Ids]:
    """Return the same for transformers' generate with its cache, the prefix loaded by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if compiled:  # lengths grow by one with each token
        base.forward = torch.compile(base.forward, dynamic=True)
    model = PeftModel.from_pretrained(base, str(folder / "prefix")).to(device).eval()
    tokens = torch.from_numpy(prompts(folder, n_rows)).to(device)
    lengths = {"max_new_tokens": n_new, "min_new_tokens": n_new}

    @torch.inference_mode()
    def decode() -> Ids:
        mask = torch.ones_like(tokens)
        made = model.generate(input_ids=tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        return made[:, PROMPT:].tolist()

    return decode


def jaxprefix_bandwidth() -> tuple[Callable[[], Any], int]:
    """Return a function that reads an array once, and the array's bytes."""
    import jax
    import jax.numpy as jnp

    rows = READ_ROWS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    array, total = jnp.ones((rows, 2**18), jnp.float32), jax.jit(lambda a: a.sum(axis=1))
    return lambda: total(array).block_until_ready(), array.nbytes


def peft_bandwidth() -> tuple[Callable[[], Any], int]:
    """Return the same in PyTorch."""
    import torch

    device, rows = ("cuda", READ_ROWS["gpu"]) if torch.cuda.is_available() else ("cpu", READ_ROWS["cpu"])
    array = torch.ones(rows, 2**18, device=device)
    return lambda: array.sum(dim=1)[0].item(), array.nbytes


Decoder = Callable[[Path, int, int, str], Callable[[], Ids]]
Bandwidth = Callable[[], tuple[Callable[[], Any], int]]
WAYS: dict[str, tuple[Decoder, Bandwidth]] = {
    "jaxprefix": (jaxprefix_decoder, jaxprefix_bandwidth),
    "peft": (peft_decoder, peft_bandwidth),
    "peft_compiled": (functools.partial(peft_decoder, compiled=True), peft_bandwidth),
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return a call's seconds and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(way: str, folder: Path, n_rows: int, n_new: int, dtype: str) -> Iterator[Turn | str]:
    """Decode with one way in this process, once a turn. Raises RuntimeError when a row stops early."""
    decoder, bandwidth = WAYS[way]
    decode = decoder(folder, n_rows, n_new, dtype)
    decode()
    peaks = {"peak_bytes": peak_memory(), "device_peak_bytes": peak_device_memory(way)}
    read, n_bytes = bandwidth()
    read()
    yield platform_of(way)
    while True:
        seconds, made = timed(decode)
        if [len(row) for row in made] != [n_new] * n_rows:
            raise RuntimeError(f"{way} made {[len(row) for row in made]} tokens instead of {n_rows} rows of {n_new}")
        yield {
            "tokens_per_s": n_rows * n_new / seconds,
            "bytes_per_s": n_bytes / min(timed(read)[0] for _ in range(10)),
            "ids": hashlib.sha256(json.dumps(made).encode()).hexdigest(),
            **peaks,
        }


def bytes_per_token(shape: str, dtype: str) -> int:
    """Return the bytes of weights that one decoding step reads: all but the embeddings', unless one is the head."""
    from jaxprefix.models import weight_shapes

    config = model_config(SHAPES[shape])
    shapes = {path: math.prod(size) for path, size in weight_shapes(config).items()}
    head = "embed.weight" if config.tied_head else "head.weight"
    n_weights = shapes[head] + sum(size for path, size in shapes.items() if not path.startswith(("embed", "head")))
    return n_weights * (4 if dtype == "float32" else 2)


def write_prefix(folder: Path, shape: str) -> None:
    """Write a random prefix as an adapter folder."""
    config = model_config(SHAPES[shape])
    folded = np.random.default_rng(0).standard_normal((PREFIX, config.folded_width), dtype=np.float32)
    write_adapter(folder, folded, config.n_layer, config.n_head, {})


def rows_of_table(results: dict[str, list[dict[str, Any]]], steps_per_s: float) -> list[list[str]]:
    """Return a line of the table for each way and number of rows; steps_per_s is the limit."""
    lines = []
    for name, runs in results.items():
        way, n_rows = name.split(":")
        ours = results[f"jaxprefix:{n_rows}"]
        same = bool(runs) and len({turn["ids"] for turn in [*ours, *runs]}) == 1
        speed = median(runs, "tokens_per_s")
        lines.append(
            [
                way,
                n_rows,
                f"{speed:.1f}",
                f"{ratio(ours, runs, 'tokens_per_s'):.2f}",
                f"{speed / int(n_rows) / steps_per_s:.2f}",
                gib(largest(runs, "device_peak_bytes") or largest(runs, "peak_bytes")),
                "yes" if same else "no",
            ]
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["jaxprefix", "peft"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="prompts that are continued together")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=int, default=5, help="decodings of a process")
    add_turns(parser)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "base", SHAPES[flags.shape], flags.dtype)
        write_prefix(folder / "prefix", flags.shape)
        ways = [(way, n_rows) for n_rows in flags.rows for way in flags.ways]
        arguments = {f"{way}:{n}": (way, folder, n, flags.new_tokens, flags.dtype) for way, n in ways}
        results = take_turns(arguments, measure, flags.times, flags.alone)
    n_bytes = bytes_per_token(flags.shape, flags.dtype)
    bandwidth = max(result["bytes_per_s"] for runs in results.values() for result in runs)
    header = ["decoding", "rows", "new tokens/s", "jaxprefix is × as fast", "of its limit", "peak GiB", "same ids"]
    setting = f"{flags.dtype}, prefix {PREFIX}, prompts of {PROMPT} tokens, {flags.new_tokens} new ones"
    limit = f"{n_bytes / 1e9:.2f} GB of weights a step at {bandwidth / 1e9:.1f} GB/s: {bandwidth / n_bytes:.1f} steps/s"
    title = f"{flags.shape}, {setting}, {turns_title(flags.times, 'decodings', flags.alone)}. The limit: {limit}"
    text = table(header, rows_of_table(results, bandwidth / n_bytes))
    publish(f"decode_{flags.shape}_{flags.dtype}", f"{title}\n\n{text}", results)


if __name__ == "__main__":
    main()
