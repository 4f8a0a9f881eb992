"""Training speed: useful tokens per second of one update, against torch_ref and against PEFT on transformers.

python -m benchmarks.train --shape 110m --data documents.jsonl --ways jaxprefix:float32 peft:float32
python -m benchmarks.train --shape 1.4b --tokens 2048 --ways jaxprefix:bfloat16 peft:bfloat16 --alone 2

All take the same batches of the same examples in the original's setting, and make their updates in turn, so that a
machine whose speed changes from minute to minute changes for all; ratios are medians over turns. Useful tokens are
labels in the loss; their share is of all positions computed, padding included. The limit is 4N FLOPs a token plus
attention's, at the rate of consecutive products of the MLP's shape in the same process and turn.
"""

import argparse
import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from benchmarks.processes import Turn, peak_device_memory, peak_memory, platform_of, take_turns
from benchmarks.report import (
    add_compute,
    add_turns,
    compute_of,
    compute_suffix,
    compute_title,
    gib,
    largest,
    median,
    publish,
    ratio,
    table,
    turns_title,
)
from benchmarks.shapes import SAMPLE, SHAPES, attention_flops, is_gpt2, make_folder, sizes_of
from jaxprefix.config import DType, TrainConfig
from jaxprefix.data.batches import make_padded_batch
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.data.plan import UpdatePlan
from jaxprefix.data.rows import IGNORED, row_lengths
from jaxprefix.data.shapes import PaddedShape
from jaxprefix.tokenizer import load_tokenizer

PREFIX = 10
RATE_TOKENS = {"cpu": 512, "gpu": 8192}
RATE_PAIRS, RATE_TIMES = {"cpu": 10, "gpu": 100}, 3
"""Pairs of products in a call that measures their rate: milliseconds, to hide the call's cost; calls for a median."""


class Training(NamedTuple):
    """One way to train, ready to go."""

    n_useful: list[int]
    """Labels of each batch."""
    lengths: list[np.ndarray]
    """Tokens of each batch's rows."""
    shapes: list[tuple[int, ...]]
    """Shape of each batch as it is computed, padding included."""
    update: Callable[[int], Callable[[], object]]
    """Starts the update of a batch, and returns a function that waits for its loss."""

    @property
    def first(self) -> list[int]:
        """The first batch of each shape: updates on these, before measuring, get all shapes compiled or planned."""
        return [self.shapes.index(shape) for shape in dict.fromkeys(self.shapes)]


def jaxprefix_training(config: TrainConfig) -> Training:
    """Prepare the update of `jaxprefix train`, with its packed batches."""
    import jax

    from jaxprefix.inputs import batch_shapes, read_inputs, update_batches
    from jaxprefix.machine.compiling import prepare_compiling
    from jaxprefix.models import load_model
    from jaxprefix.prefix import new_encoder
    from jaxprefix.recipe import RECIPES
    from jaxprefix.sharding import base_sharding, make_mesh, replicated
    from jaxprefix.update import FrozenBase, first_state, learning_rate, make_update

    prepare_compiling()
    mesh = make_mesh()
    inputs = read_inputs(config)
    place = base_sharding(mesh, inputs.base.config.n_head)
    base = load_model(Path(config.pretrained_model_dir), config.dtype, place, inputs.base.config, config.compute)
    rate = jax.device_put(learning_rate(config, inputs.plan.n_updates), replicated(mesh))
    encoder = new_encoder(base, *config.encoder_sizes, config.seed)
    state = jax.device_put(first_state(config, encoder), replicated(mesh))
    compiled_update = make_update(config.adamw, RECIPES[config.recipe], mesh)
    batches = list(update_batches(config, inputs, batch_shapes(config, inputs, mesh), 0))
    frozen_base = FrozenBase.of(base)

    def update(number: int) -> Callable[[], object]:
        nonlocal state
        state, outcome = compiled_update(state, rate, frozen_base, batches[number])
        return outcome.loss.block_until_ready

    n_useful, examples = [batch.n_labels for batch in batches], inputs.train_set
    groups = (inputs.plan.micro_batches(number)[0] for number in range(len(batches)))
    lengths = [row_lengths([examples[i] for i in group]) for group in groups]
    return Training(n_useful, lengths, [batch.tokens.shape for batch in batches], update)


def torch_batches(config: TrainConfig) -> tuple[list[Any], list[int], list[np.ndarray]]:
    """Return the same batches as (tokens, labels), padded like the original's, their useful tokens and row lengths."""
    import torch

    tokenizer = load_tokenizer(Path(config.pretrained_model_dir))
    examples = read_examples(config.data_filepath, Chunking(tokenizer, max_seq_len=config.max_seq_len))
    plan = UpdatePlan(config, config.train_data_size)
    batches, n_useful, lengths = [], list[int](), list[np.ndarray]()
    for number in range(plan.n_updates):
        group = [examples[i] for i in plan.micro_batches(number)[0]]
        batch = make_padded_batch(group, tokenizer, PaddedShape(2 * len(group), int(row_lengths(group).max())))
        batches.append((torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.labels).long()))
        n_useful.append(batch.n_labels)
        lengths.append(row_lengths(group))
    return batches, n_useful, lengths


def torch_ref_training(config: TrainConfig) -> Training:
    """Prepare the reference without DeepSpeed; bfloat16 by autocast."""
    import torch

    from torch_ref.config import train_parser
    from torch_ref.models import load_base
    from torch_ref.prefix import PrefixEncoder
    from torch_ref.train import batch_loss
    from torch_ref.update import PlainSteps

    flags = ["--pretrained_model_dir", config.pretrained_model_dir, "--data_filepath", str(config.data_filepath)]
    kind = "gpt" if is_gpt2(Path(config.pretrained_model_dir)) else "gpt-neox"
    parsed = train_parser().parse_args([*flags, "--save_name", config.save_name, "--model_type", kind])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(parsed, device=device)
    encoder = PrefixEncoder.of(base, PREFIX, 10, 10).to(device)
    steps = PlainSteps(encoder, parsed, 0)
    batches, n_useful, lengths = torch_batches(config)

    def update(number: int) -> Callable[[], object]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = batch_loss(base, encoder(len(batches[number][0])), batches[number], IGNORED)
        steps.step(loss)
        return loss.item

    return Training(n_useful, lengths, [tuple(tokens.shape) for tokens, _ in batches], update)


def peft_training(config: TrainConfig, compiled: bool = False) -> Training:
    """Prepare PEFT's prefix tuning on transformers' model, with scaled-dot-product attention."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config.dtype)
    base = AutoModelForCausalLM.from_pretrained(config.pretrained_model_dir, dtype=dtype, attn_implementation="sdpa")
    sizes: dict[str, Any] = {"num_virtual_tokens": PREFIX, "prefix_projection": True, "encoder_hidden_size": 10}
    model: Any = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", **sizes)).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.99))
    batches, n_useful, lengths = torch_batches(config)

    def update(number: int) -> Callable[[], object]:
        tokens, labels = (part.to(device) for part in batches[number])
        loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss  # the labels are shifted already
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item

    return Training(n_useful, lengths, [tuple(tokens.shape) for tokens, _ in batches], update)


WAYS: dict[str, Callable[[TrainConfig], Training]] = {
    "jaxprefix": jaxprefix_training,
    "torch_ref": torch_ref_training,
    "peft": peft_training,
    "peft_compiled": functools.partial(peft_training, compiled=True),
}


def random_factors(n_tokens: int, width: int, inner: int) -> list[np.ndarray]:
    """Return tokens and an MLP's two matrices, random since GPUs multiply constants faster, with products of std 1."""
    random, shapes = np.random.default_rng(0), ((n_tokens, width), (inner, width), (width, inner))
    x, up, down = (random.standard_normal(shape, np.float32) for shape in shapes)
    return [x, up / width**0.5, down / inner**0.5]


def jax_products(dtype: str, width: int, inner: int) -> tuple[Callable[[], None], int]:
    """Return a function that multiplies tokens by an MLP's two matrices, pair after pair, and the number of tokens."""
    import jax
    import jax.numpy as jnp

    from jaxprefix.models.layers import frozen_matmul

    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    n_tokens, n_pairs = RATE_TOKENS[kind], RATE_PAIRS[kind]
    x, up, down = (jnp.asarray(factor, dtype) for factor in random_factors(n_tokens, width, inner))

    @jax.jit
    def pairs(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n_pairs, lambda _, x: frozen_matmul(frozen_matmul(x, up), down), x)

    return lambda: pairs(x, up, down).block_until_ready(), n_pairs * n_tokens


def torch_products(dtype: str, width: int, inner: int) -> tuple[Callable[[], None], int]:
    """Return the same in PyTorch."""
    import torch

    device, kind = ("cuda", "gpu") if torch.cuda.is_available() else ("cpu", "cpu")
    n_tokens, n_pairs = RATE_TOKENS[kind], RATE_PAIRS[kind]
    factors = random_factors(n_tokens, width, inner)
    x, up, down = (torch.from_numpy(factor).to(device, getattr(torch, dtype)) for factor in factors)

    def run() -> None:
        y = x
        for _ in range(n_pairs):
            y = torch.nn.functional.linear(torch.nn.functional.linear(y, up), down)
        y[0, 0].item()

    return run, n_pairs * n_tokens


def matrix_rate(way: str, dtype: str, width: int, inner: int) -> Callable[[], float]:
    """Return a function that measures the FLOP/s of an MLP's two products; a median, since a first call is slow."""
    run, n_tokens = (jax_products if way == "jaxprefix" else torch_products)(dtype, width, inner)
    run()

    def seconds(_: int) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return lambda: 4 * n_tokens * width * inner / float(np.median(list(map(seconds, range(RATE_TIMES)))))


def measure(way: str, config: TrainConfig, n_a_turn: int) -> Iterator[Turn | str]:
    """Time updates of one way in this process, `n_a_turn` in a turn."""
    n_layer, width, inner, vocab = sizes_of(Path(config.pretrained_model_dir))
    n_matrix = n_layer * (4 * width * width + 2 * width * inner) + vocab * width
    training = WAYS[way](config)
    for number in training.first:
        training.update(number)()
    measured_rate = matrix_rate(way, config.dtype, width, inner)
    yield platform_of(way)
    for first in range(0, config.n_training_steps, n_a_turn):
        numbers = range(first, first + n_a_turn)
        started = time.perf_counter()
        waiting = [training.update(number) for number in numbers]
        waiting[-1]()
        seconds = time.perf_counter() - started
        peaks = {"peak_bytes": peak_memory(), "device_peak_bytes": peak_device_memory(way)}
        rate = measured_rate()
        n_useful = sum(training.n_useful[number] for number in numbers)
        of_attention = attention_flops([training.lengths[number] for number in numbers], PREFIX, n_layer, width)
        of_limit = (4 * n_matrix * n_useful + of_attention) / (rate * seconds)
        useful = n_useful / sum(math.prod(training.shapes[number]) for number in numbers)
        speed = {"tokens_per_s": n_useful / seconds, "step_s": seconds / n_a_turn}
        yield {**speed, "useful": useful, "rate": rate, "of_limit": of_limit, **peaks}


def arguments_of(ways: Sequence[str], config: TrainConfig) -> dict[str, tuple[str, TrainConfig]]:
    """Return the name and the config of each way and type, such as peft:bfloat16."""
    named = {way: way.split(":") for way in ways}
    return {way: (name, dataclasses.replace(config, dtype=cast(DType, dtype))) for way, (name, dtype) in named.items()}


def strung_together(data: Path, folder: Path, max_seq_len: int, n_examples: int) -> Path:
    """Join all documents into one, and repeat it until it makes n_examples chunks of nearly max_seq_len tokens."""
    documents = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    line = json.dumps({"text": "\n".join(documents)}, ensure_ascii=False) + "\n"
    path = folder / "long.jsonl"
    path.write_text(line, encoding="utf-8")
    n_of_one = len(read_examples(path, Chunking(load_tokenizer(folder), max_seq_len=max_seq_len)))
    path.write_text(line * -(-n_examples // n_of_one), encoding="utf-8")
    return path


def rows_of_table(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return a line of the table for each way; the first way is compared with every other."""
    first, *_ = results.values()
    return [
        [
            way,
            f"{median(r, 'tokens_per_s'):.0f}",
            f"{ratio(first, r, 'tokens_per_s'):.2f}",
            f"{median(r, 'step_s'):.3g}",
            f"{median(r, 'useful'):.2f}",
            f"{median(r, 'rate') / 1e9:.0f}",
            f"{median(r, 'of_limit'):.2f}",
            gib(largest(r, "peak_bytes")),
            gib(largest(r, "device_peak_bytes")),
        ]
        for way, r in results.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument(
        "--tokens", type=int, help="of the longest row, prefix and bos included; strings documents together"
    )
    parser.add_argument("--ways", nargs="+", default=["jaxprefix:float32", "torch_ref:float32", "peft:float32"])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--updates_a_turn", type=int, default=1, help="between which nothing waits: for fast devices")
    parser.add_argument("--batch_size", type=int, default=4, help="examples of a batch, each makes two rows")
    add_compute(parser)
    add_turns(parser)
    flags = parser.parse_args()
    if flags.updates % flags.updates_a_turn:
        parser.error(f"--updates {flags.updates} is no multiple of --updates_a_turn {flags.updates_a_turn}")
    max_seq_len = flags.tokens - PREFIX - 1 if flags.tokens else TrainConfig.max_seq_len
    with tempfile.TemporaryDirectory() as temporary:
        disk = "bfloat16" if all(way.endswith(":bfloat16") for way in flags.ways) else "float32"
        folder, data = make_folder(Path(temporary) / "base", SHAPES[flags.shape], disk), flags.data
        if flags.tokens:
            n_examples = flags.updates * flags.batch_size + TrainConfig.dev_data_size
            data = strung_together(data, folder, max_seq_len, n_examples)
        sizes = {"train_data_size": flags.updates * flags.batch_size, "batch_size": flags.batch_size, "n_epochs": 1}
        sizes |= {"prefix_seq_len": PREFIX, "max_seq_len": max_seq_len, "n_training_steps": flags.updates}
        config = TrainConfig(str(folder), data, "benchmark", compute=compute_of(flags), **sizes)
        turns = functools.partial(measure, n_a_turn=flags.updates_a_turn)
        n_turns = flags.updates // flags.updates_a_turn
        results = take_turns(arguments_of(flags.ways, config), turns, n_turns, flags.alone)
    first = flags.ways[0]
    header = ["training", "useful tokens/s", f"{first} is × as fast", "s an update", "useful share", "matrix GFLOP/s"]
    header += ["of its limit", "host peak GiB", "GPU peak GiB"]
    rows_of = f"rows of up to {flags.tokens - PREFIX} tokens" if flags.tokens else "the original's rows"
    setting = f"batches of {flags.batch_size} examples, {rows_of}, prefix {PREFIX}"
    title = f"{flags.shape}, {setting}, {turns_title(flags.updates, 'updates', flags.alone)}"
    title += compute_title(config.compute)
    name = f"train_{flags.shape}" + (f"_{flags.tokens}" if flags.tokens else "") + compute_suffix(config.compute)
    publish(name, f"{title}\n\n{table(header, rows_of_table(results))}", results)


if __name__ == "__main__":
    main()
