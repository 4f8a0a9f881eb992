"""Many thousand broken inputs, made from good ones: each is refused plainly or read as another reader reads it.

    python -m tests.torture.fuzz --inputs 21000 --seed 0 --keep FOLDER

A find is any exception but those that end in plain lines, more than SECONDS, more than BYTES of memory, or an accepted
input that an independent reading contradicts. Prints a table, then the finds, and exits with code 1 if there are any.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.numpy import save

from convert.errors import InputError, RunError
from convert.prefix import read_prefix
from jaxprefix import cli, load_tokenizer
from jaxprefix.config import Compute, ConvertConfig, HostsConfig, TrainConfig
from jaxprefix.data.examples import Chunking, Example, chunk_document, read_examples
from jaxprefix.inference_config import DecodeConfig, EvaluateConfig, GenerateConfig
from jaxprefix.models.config import read_model_config
from tests.base_folders import GOLDEN, GOLDEN_BASE, TINY, TINY_GPT2
from tests.memory import forget_peak, memory
from tests.torture.mutations import VALUES, broken_bytes, broken_json
from tests.torture.other_readers import reread_npy, reread_safetensors, reread_torch

SECONDS, BYTES = 10, 2**30
SHARES = {"data": 6, "weight": 3, "safetensors": 3, "npy": 3, "adapter": 2, "config": 3, "command line": 1}
"""Of 21 inputs."""


class Hang(BaseException):
    """An input took more than SECONDS."""


class Contradiction(Exception):
    """Another reader reads something else."""


@dataclasses.dataclass
class Target:
    """What is tried."""

    make: Callable[[random.Random], Any]
    """Make a broken input."""
    read: Callable[[Any], None]
    """Read it, and compare what was accepted; raises what refuses it."""


@dataclasses.dataclass
class Tally:
    """What came of a target's inputs."""

    n_inputs: int = 0
    n_refused: int = 0
    longest: float = 0.0
    """Seconds."""
    peak: int = 0
    """Bytes of memory above those before the first input."""
    finds: list[str] = dataclasses.field(default_factory=list)


def data_target(folder: Path) -> Target:
    """JSON Lines, plain and gzip."""
    tokenizer = load_tokenizer(GOLDEN_BASE)
    good = [
        {"text": "朝の市場は。\n魚を買った。👨‍👩‍👧\n"},
        {"prompt": "朝の", "completion": "市場。"},
        {"text": "a" * 300},
    ]

    def make(generator: random.Random) -> tuple[bytes, bool, bool]:
        lines = [json.dumps(record, ensure_ascii=generator.random() < 0.5).encode() for record in good]
        spoilt = generator.randrange(len(lines))
        lines[spoilt] = broken_json(good[spoilt], generator)
        content = generator.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)
        content = content if generator.random() < 0.6 else broken_bytes(content, generator)
        packed = generator.random() < 0.2
        if packed:
            content = gzip.compress(content)
            content = content if generator.random() < 0.5 else broken_bytes(content, generator)
        return content, packed, generator.random() < 0.3

    def read(made: tuple[bytes, bool, bool]) -> None:
        content, packed, skipping = made
        path = folder / f"data.jsonl{'.gz' * packed}"
        path.write_bytes(content)
        chunking = Chunking(tokenizer, skip_bad_lines=skipping)
        examples = list(read_examples(path, chunking))
        expected: list[Example] = []
        content = gzip.decompress(content) if packed else content
        for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if not skipping else ():
            record = json.loads(line) if line.decode().strip() else {"text": ""}
            if record.keys() >= {"prompt", "completion"}:
                expected.append(Example(tokenizer.encode(record["prompt"]), tokenizer.encode(record["completion"])))
            else:
                expected += [Example([], chunk) for chunk in chunk_document(record["text"].split("\n"), chunking)[0]]
        agree(skipping or examples == expected, "other examples")

    return Target(make, read)


def prefix_target(path: Path, good: list[bytes], reread: Callable[[bytes], np.ndarray | None]) -> Target:
    """Prefix files of one kind; `reread` is another reader. What it cannot read must be a good file's numbers."""

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found, expected = read_prefix(path)[0], reread(content)
        if expected is None:
            agree(any(np.array_equal(found, reread(file)) for file in good), "numbers of no good file")
        else:
            same_numbers(found, expected)

    return Target(lambda generator: broken_bytes(generator.choice(good), generator), read)


def same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare a prefix with another reader's array."""
    expected = np.asarray(expected, np.float32)
    agree(found.dtype == np.float32 and found.ndim == 2 and bool(np.isfinite(found).all()), "no prefix")
    agree(found.size == expected.size, f"{found.shape} numbers, not {expected.shape}")
    if expected.ndim == 5:
        expected = expected.transpose(2, 0, 1, 3, 4)
    agree(np.array_equal(found, expected.reshape(found.shape)), "other numbers")


def agree(same: bool, difference: str) -> None:
    """Raise Contradiction unless two readings are the same."""
    if not same:
        raise Contradiction(difference)


def prefix_targets(folder: Path) -> Iterator[tuple[str, Target]]:
    """Yield a target for each kind of prefix file, and for adapter folders."""
    array = np.random.default_rng(0).standard_normal((4, 24), dtype=np.float32)
    tensor = torch.from_numpy(array)
    weights, arrays = [], []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        for content in (tensor, torch.nn.Parameter(tensor.half()), {"prompt_embeddings": tensor.bfloat16()}, tensor.T):
            file = io.BytesIO()
            torch.save(content, file, **options)
            weights.append(file.getvalue())
    for stored in (array, array.astype(np.float16), array.astype(">f8"), array.reshape(1, 2, 4, 2, 6)):
        file = io.BytesIO()
        np.save(file, stored)
        arrays.append(file.getvalue())
    header = {"format": "pt", "n_layer": "1", "n_head": "2", "head_dim": "6"}
    tensors = [save({"prompt_embeddings": array}, header), save({"p": array.astype(np.float16)}), save({"p": array})]
    yield "weight", prefix_target(folder / "p.weight", weights, reread_torch)
    yield "safetensors", prefix_target(folder / "p.safetensors", tensors, reread_safetensors)
    yield "npy", prefix_target(folder / "p.npy", arrays, reread_npy)

    adapter = folder / "adapter"
    adapter.mkdir()
    sizes = {"num_virtual_tokens": 4, "token_dim": 12, "num_layers": 1, "num_attention_heads": 2}
    good = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "rinna/x", "encoder_hidden_size": 12} | sizes

    def make(generator: random.Random) -> tuple[bytes, bytes]:
        spoilt = broken_bytes(generator.choice(tensors), generator) if generator.random() < 0.3 else tensors[0]
        return broken_json(good, generator), spoilt

    def read(made: tuple[bytes, bytes]) -> None:
        for name, content in zip(("adapter_config.json", "adapter_model.safetensors"), made, strict=True):
            (adapter / name).write_bytes(content)
        found, shape = read_prefix(adapter)
        same_numbers(found, reread_safetensors(made[1]))
        if {"n_layer", "n_head", "head_dim"} <= shape.keys():
            product = 2 * math.prod(int(shape[field]) for field in ("n_layer", "n_head", "head_dim"))
            agree(product == found.shape[1], f"shape {shape} of {found.shape}")

    yield "adapter", Target(make, read)


def config_target(folder: Path) -> Target:
    """Base models' config.json."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    bare = {key: value for key, value in TINY.items() if not key.startswith("rotary")}
    good = [
        TINY,
        bare | {"rope_parameters": rope},
        TINY | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        TINY_GPT2,
    ]

    def read(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        config, raw = read_model_config(folder), json.loads(content)
        for ours, theirs in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size"), ("vocab_size", "vocab_size")):
            agree(getattr(config, ours) in (raw.get(theirs), raw.get(ours)), f"another {ours}")
        sizes = (config.n_layer, config.head_dim, config.n_inner, config.vocab_size, config.n_positions)
        agree(all(0 < size <= 2**24 for size in sizes), f"sizes {sizes}")
        agree(config.head_dim * config.n_head == config.n_embd, "heads that do not divide the width")
        agree(0 <= config.rotary_dim <= config.head_dim and 0 < config.max_positions < 2**40, "rotary")

    return Target(lambda generator: broken_json(generator.choice(good), generator), read)


def command_target() -> Target:
    """Command lines through the parser; what they ask for is not done."""
    base, data = str(GOLDEN_BASE), str(GOLDEN / "documents.jsonl")
    good = [
        ["train", "--pretrained_model_dir", base, "--data_filepath", data, "--save_name", "x", "--max_lr", "1e-3"],
        ["train", "--pretrained_model_dir", base, "--data_filepath", data, "--save_name", "x", "--mesh", "data=2"],
        ["generate", "--pretrained_model_dir", base, "--prompt", "a", "--top_p", "0.9", "--seed", "1"],
        ["evaluate", "--pretrained_model_dir", base, "--n_samples", "3", "--suffix", "!"],
        ["convert", "a.weight", "b.npy", "--pretrained_model_dir", base],
        ["check", "--pretrained_model_dir", base, "--prefix_seq_len", "3", "--coordinator_address", "a:1"],
    ]
    settings = (TrainConfig, GenerateConfig, EvaluateConfig, ConvertConfig, DecodeConfig, Compute, HostsConfig)
    flags = sorted({f"--{field.name}" for each in settings for field in dataclasses.fields(each)})
    values = [str(value) for value in VALUES if str(value).isprintable()] + ["\udcff", "-", "--", "=", "data=0,fsdp=-1"]

    def make(generator: random.Random) -> list[str]:
        words = list(generator.choice(good))
        for _ in range(generator.choice((1, 1, 2, 3))):
            place = generator.randrange(1, len(words) + 1)
            match generator.randrange(4):
                case 0:
                    words[place:place] = [generator.choice(flags), generator.choice(values)]
                case 1:
                    words[place : place + 1] = [generator.choice(values)]
                case 2:
                    del words[place:]
                case _:
                    words[place:place] = [generator.choice(flags)]
        return words

    def read(words: list[str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(words)
        if code == 2:
            raise InputError("refused")

    return Target(make, read)


def targets(folder: Path) -> dict[str, Target]:
    """Return everything that is tried; `folder` is for its files."""
    rest = {"data": data_target(folder), "config": config_target(folder), "command line": command_target()}
    return {**rest, **dict(prefix_targets(folder))}


def hang(*_: Any) -> None:
    """Interrupt an input that takes too long."""
    raise Hang


def attempt(target: Target, made: Any, tally: Tally) -> None:
    """Try one input and note what came of it."""
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tally.n_inputs += 1
    try:
        target.read(made)
    except (InputError, RunError, SystemExit):
        tally.n_refused += 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        tally.finds.append(f"{type(error).__name__}: {str(error)[:120]} at {Path(place.filename).name}:{place.lineno}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.longest = max(tally.longest, time.monotonic() - start)


def fuzz(n_inputs: int, seed: int, keep: Path | None = None) -> dict[str, Tally]:
    """Try about n_inputs inputs; return what came of them by target. Inputs that are finds are kept in a folder."""
    tallies = {name: Tally() for name in SHARES}
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(cli, "_perform", return_value=0):
        every_target = targets(Path(folder))
        before_handler = signal.signal(signal.SIGALRM, hang)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + BYTES, limits[1]))
        try:
            for name, share in SHARES.items():
                forget_peak()
                generator, tally, before = random.Random(f"{seed} {name}"), tallies[name], memory("VmHWM")
                for number in range(-(-n_inputs * share // sum(SHARES.values()))):
                    made = every_target[name].make(generator)
                    attempt(every_target[name], made, tally)
                    if tally.finds and keep and not (keep / f"{name} {len(tally.finds)}").exists():
                        (keep / f"{name} {len(tally.finds)}").write_text(f"{number}\n{made!r}\n{tally.finds[-1]}")
                tally.peak = memory("VmHWM") - before
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            signal.signal(signal.SIGALRM, before_handler)
    return tallies


def main(inputs: int = 21_000, seed: int = 0, keep: Path | None = None) -> int:
    """Try the inputs, print what came of them, and return the exit code; `keep` is an existing folder for finds."""
    tallies = fuzz(inputs, seed, keep)
    print(f"| {'target':12} | inputs | refused | accepted | longest, ms | peak, MiB |")
    for name, tally in tallies.items():
        n_accepted = tally.n_inputs - tally.n_refused - len(tally.finds)
        figures = f"{tally.n_refused:7} | {n_accepted:8} | {1000 * tally.longest:11.0f} | {tally.peak / 2**20:9.0f}"
        print(f"| {name:12} | {tally.n_inputs:6} | {figures} |")
    finds = [f"{name}: {find}" for name, tally in tallies.items() for find in tally.finds]
    print(f"{sum(tally.n_inputs for tally in tallies.values()):,} inputs, {len(finds)} finds")
    print("\n".join(sorted(set(finds))))
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
