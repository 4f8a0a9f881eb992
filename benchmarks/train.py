"""Training speed: useful tokens per second of one update, against torch_ref and against PEFT on transformers.

python -m benchmarks.train --shape 110m --data documents.jsonl --ways jaxprefix:float32 peft:float32

All take the same batches of the same examples in the original's setting, and make their updates in turn, so that a
machine whose speed changes from minute to minute changes for all; ratios are medians over updates. Useful tokens are
labels in the loss. The limit is 4N FLOPs a token at the rate that a matrix product of the model's shape reaches in the
same process in the same turn.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import (
    end_turn,
    median,
    peak_device_memory,
    peak_memory,
    publish,
    table,
    take_turns,
    wait_for_turn,
    work_alone,
)
from benchmarks.shapes import SHAPES, make_folder

PREFIX = 10


def jaxprefix_steps(folder: Path, data: Path, dtype: str, batch_size: int) -> tuple[list[int], Callable[[int], None]]:
    """Return (useful tokens of each batch, a function that makes the update of a batch)."""
    import jax

    from jaxprefix.cli import keep_compiled_programs
    from jaxprefix.config import TrainConfig
    from jaxprefix.data import IGNORED
    from jaxprefix.inputs import read_inputs, update_batches
    from jaxprefix.models import load_model
    from jaxprefix.recipe import RECIPES
    from jaxprefix.sharding import base_sharding, make_mesh, replicated
    from jaxprefix.train import start_state
    from jaxprefix.update import learning_rate, make_optimizer, make_update

    keep_compiled_programs()
    sizes = {"train_data_size": 200, "n_epochs": 1, "batch_size": batch_size}
    config = TrainConfig(str(folder), data, "benchmark", dtype=dtype, prefix_seq_len=PREFIX, **sizes)
    inputs, mesh = read_inputs(config, RECIPES["default"]), make_mesh()
    base = load_model(folder, dtype, base_sharding(mesh), inputs.base.config)
    optimizer = make_optimizer(config, learning_rate(config, RECIPES["default"], inputs.plan.n_updates))
    state = jax.device_put(start_state(config, base, inputs.base.tokenizer, optimizer, False), replicated(mesh))
    update = make_update(optimizer, RECIPES["default"], mesh)
    batches = list(update_batches(config, inputs, mesh, 0))

    def step(number: int) -> None:
        nonlocal state
        state, outcome = update(state, base, batches[number])
        outcome.loss.block_until_ready()

    for shape in {batch.tokens.shape for batch in batches}:  # compile each
        step(next(n for n, batch in enumerate(batches) if batch.tokens.shape == shape))
    return [int((batch.labels != IGNORED).sum()) for batch in batches], step


def torch_batches(folder: Path, data: Path, batch_size: int) -> tuple[list[Any], int]:
    """Return the same batches, padded as the original pads them, and the pad id."""
    import torch

    from jaxprefix.config import TrainConfig
    from jaxprefix.data import IGNORED, longest_row, make_batch
    from jaxprefix.inputs import read_inputs
    from jaxprefix.recipe import RECIPES

    sizes = {"train_data_size": 200, "n_epochs": 1, "batch_size": batch_size}
    inputs = read_inputs(TrainConfig(str(folder), data, "benchmark", **sizes), RECIPES["default"])
    batches = []
    for number in range(inputs.plan.n_updates):
        group = [inputs.train_set[i] for i in inputs.plan.micro_batches(number)[0]]
        batch = make_batch(group, inputs.base.tokenizer, 2 * len(group), longest_row(group))
        tokens, labels = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.labels).long()
        batches.append((tokens, torch.where(labels == IGNORED, -100, labels)))
    return batches, -100


def torch_ref_steps(folder: Path, data: Path, dtype: str, batch_size: int) -> tuple[list[int], Callable[[int], None]]:
    """The same of the reference without DeepSpeed; in bfloat16 under autocast."""
    import torch

    from torch_ref.config import train_parser
    from torch_ref.models import load_base
    from torch_ref.prefix import PrefixEncoder
    from torch_ref.train import batch_loss
    from torch_ref.update import PlainSteps

    flags = ["--pretrained_model_dir", str(folder), "--data_filepath", str(data), "--save_name", "benchmark"]
    parsed = train_parser().parse_args(flags)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(parsed, device=device)
    encoder = PrefixEncoder.of(base, PREFIX, 10, 10).to(device)
    steps = PlainSteps(encoder, parsed, 0)
    batches, ignored = torch_batches(folder, data, batch_size)

    def step(number: int) -> None:
        tokens, labels = batches[number]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = batch_loss(base, encoder(len(tokens)), (tokens, labels), ignored)
        steps.step(loss)
        loss.item()

    step(0)
    return [int((labels != ignored).sum()) for _, labels in batches], step


def peft_steps(folder: Path, data: Path, dtype: str, batch_size: int) -> tuple[list[int], Callable[[int], None]]:
    """The same of PEFT's prefix tuning on transformers' model, with scaled-dot-product attention."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, prefix_projection=True, encoder_hidden_size=10
    )
    model = peft.get_peft_model(base, config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.99))
    batches, ignored = torch_batches(folder, data, batch_size)

    def step(number: int) -> None:
        tokens, labels = (part.to(device) for part in batches[number])
        logits = model(input_ids=tokens).logits  # labels here are shifted already
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=ignored)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    step(0)
    return [int((labels != ignored).sum()) for _, labels in batches], step


WAYS = {"jaxprefix": jaxprefix_steps, "torch_ref": torch_ref_steps, "peft": peft_steps}


def matrix_rate(way: str, dtype: str, width: int, inner: int) -> Callable[[], float]:
    """Return a function that measures the FLOP/s of a matrix product of the MLP's shape for 512 tokens."""
    if way == "jaxprefix":
        import jax
        import jax.numpy as jnp

        a, w = jnp.ones((512, width), dtype), jnp.ones((inner, width), dtype)
        product = jax.jit(lambda a, w: jnp.einsum("ti,oi->to", a, w, preferred_element_type=jnp.float32).astype(dtype))

        def run() -> None:
            product(a, w).block_until_ready()
    else:
        import torch

        x, y = (
            torch.ones(512, width, dtype=getattr(torch, dtype)),
            torch.ones(inner, width, dtype=getattr(torch, dtype)),
        )

        def run() -> None:
            torch.nn.functional.linear(x, y)

    def measured() -> float:
        best = math.inf
        for _ in range(20):
            started = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - started)
        return 2 * 512 * width * inner / best

    return measured


def measure(way: str, folder: Path, data: Path, n_updates: int, batch_size: int) -> None:
    """Time updates of one way in this process, one a turn."""
    name, dtype = way.split(":")
    config = json.loads((folder / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    n_matrix = config["num_hidden_layers"] * (4 * width * width + 2 * width * inner) + config["vocab_size"] * width
    wait_for_turn()
    before = peak_memory()
    n_useful, step = WAYS[name](folder, data, dtype, batch_size)
    measured_rate = matrix_rate(name, dtype, width, inner)
    end_turn()
    for number in range(n_updates):
        wait_for_turn()
        started = time.perf_counter()
        step(number)
        seconds = time.perf_counter() - started
        peaks = {"peak_bytes": peak_memory() - before, "device_peak_bytes": peak_device_memory(name)}
        rate = measured_rate()
        tokens_per_s = n_useful[number] / seconds
        of_limit = tokens_per_s * 4 * n_matrix / rate
        end_turn(tokens_per_s=tokens_per_s, step_s=seconds, rate=rate, of_limit=of_limit, **peaks)


def main() -> None:
    """Print the table, or one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--data", type=Path, default=Path("data/sample_data.jsonl"))
    parser.add_argument("--ways", nargs="+", default=["jaxprefix:float32", "torch_ref:float32", "peft:float32"])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--alone", action="store_true", help="one process at a time: what fills a GPU's memory")
    parser.add_argument("--rounds", type=int, default=3, help="with --alone: processes of every way")
    parser.add_argument("--measure", help="measure one way in this process")
    parser.add_argument("--folder", type=Path, help="with --measure: the base model")
    flags = parser.parse_args()
    if flags.measure:
        measure(flags.measure, flags.folder, flags.data, flags.updates, flags.batch_size)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "base", SHAPES[flags.shape])
        common = (
            "--folder",
            folder,
            "--data",
            flags.data,
            "--updates",
            flags.updates,
            "--batch_size",
            flags.batch_size,
        )
        arguments = {way: ("--measure", way, *common) for way in flags.ways}
        if flags.alone:
            results = work_alone(arguments, "benchmarks.train", flags.updates, flags.rounds)
        else:
            results = take_turns(arguments, "benchmarks.train", flags.updates)
    first = flags.ways[0]
    rows = [
        [
            way,
            f"{median(r, 'tokens_per_s'):.0f}",
            f"{np.median([a['tokens_per_s'] / b['tokens_per_s'] for a, b in zip(results[first], r, strict=True)]):.2f}",
            f"{median(r, 'step_s'):.2f}",
            f"{median(r, 'rate') / 1e9:.0f}",
            f"{median(r, 'of_limit'):.2f}",
            f"{max(turn['peak_bytes'] for turn in r) / 2**30:.2f}",
        ]
        for way, r in results.items()
    ]
    header = ["training", "useful tokens/s", f"{first} is × as fast", "s an update", "matrix GFLOP/s", "of its limit"]
    header.append("peak GiB")
    turns = f"{flags.rounds} rounds of {flags.updates} updates" if flags.alone else f"{flags.updates} updates in turn"
    setting = f"batches of {flags.batch_size} examples, prefix {PREFIX}, {turns}"
    title = f"{flags.shape}, {setting}"
    publish(f"train_{flags.shape}", f"{title}\n\n{table(header, rows)}", results)


if __name__ == "__main__":
    main()
