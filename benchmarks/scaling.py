"""How the time of an update grows with the tokens of a batch, the layers, and the length of the prefix.

python -m benchmarks.scaling --shape 13m

Every point of a sweep is compiled first; then the points take turns, so that all see the same machine, and the fastest
of a point's turns counts. The line a + b·x with the least squared relative errors is fitted to a sweep's points.
A point's distance from the line, and the slope from the point before it ÷ b, show whether the cost is proportional.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import alternate
from benchmarks.report import publish, table
from benchmarks.shapes import SHAPES, model_config
from jaxprefix.config import DType, TrainConfig

ROW = 64
"""Tokens of every row, so that attention costs the same per token in all batches."""
USUAL = {"tokens": 2048, "layers": 4, "prefix": 10}
SWEEPS = {
    "tokens": [512, 1024, 2048, 4096, 8192, 16384],
    "layers": [2, 4, 8, 16],
    "prefix": [10, 50, 100, 250, 500],
}
SMALL = {"tokens": [128, 256, 512], "layers": [1, 2], "prefix": [10, 50]}
"""For a quick test of the program."""


def updates(shape: str, dtype: DType, tokens: int, layers: int, prefix: int) -> Callable[[], None]:
    """Return a function that makes one compiled update of a base model with random weights."""
    import jax
    import jax.numpy as jnp

    from jaxprefix.data.batches import Batch
    from jaxprefix.models import abstract_model
    from jaxprefix.prefix import new_encoder
    from jaxprefix.recipe import RECIPES
    from jaxprefix.sharding import make_mesh, replicated
    from jaxprefix.update import FrozenBase, first_state, learning_rate, make_update

    model = dataclasses.replace(model_config(SHAPES[shape]), n_layer=layers)
    config = TrainConfig(shape, Path(), shape, dtype=dtype, prefix_seq_len=prefix)
    mesh, random = make_mesh(), np.random.default_rng(0)

    def weight(leaf: Any) -> Any:
        return jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32), dtype)

    base = jax.device_put(jax.tree.map(weight, abstract_model(model)), replicated(mesh))
    rate = jax.device_put(learning_rate(config, config.n_training_steps), replicated(mesh))
    encoder = new_encoder(base, *config.encoder_sizes, config.seed)
    state = jax.device_put(first_state(config, encoder), replicated(mesh))
    rows = random.integers(0, model.vocab_size, (1, tokens // ROW, ROW + 1), np.int32)
    batch = Batch(rows[..., :-1], rows[..., 1:])
    update = make_update(config.adamw, RECIPES[config.recipe], mesh)
    frozen_base = FrozenBase.of(base)

    def step() -> None:
        nonlocal state
        state, outcome = update(state, rate, frozen_base, batch)
        outcome.loss.block_until_ready()

    return step


def measure(sweep: str, points: list[int], shape: str, dtype: DType, n_turns: int) -> dict[str, float]:
    """Return the seconds of an update at each point of a sweep, the fastest of n_turns."""
    steps = {point: updates(shape, dtype, **USUAL | {sweep: point}) for point in points}
    for step in steps.values():
        step()
    best = dict.fromkeys(points, float("inf"))
    for _ in range(n_turns):
        for point, step in steps.items():
            step()  # warms the caches, which hold another point's memory
            started = time.perf_counter()
            step()
            best[point] = min(best[point], time.perf_counter() - started)
    return {str(point): seconds for point, seconds in best.items()}


def line_through(points: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Return (a, b) of the line a + b·x whose squared errors, relative to the seconds, are least."""
    columns = np.stack([np.ones_like(points), points], axis=1) / seconds[:, None]
    start, slope = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
    return float(start), float(slope)


def tell(sweep: str, points: list[int], results: list[dict[str, float]]) -> str:
    """Return a sweep's line and its table."""
    x = np.array(points, float)
    seconds = np.array([np.median([result[str(point)] for result in results]) for point in points])
    start, slope = line_through(x, seconds)
    line = start + slope * x
    off = seconds / line - 1
    added = ["", *(f"{ratio:.2f}" for ratio in np.diff(seconds) / np.diff(x) / slope)]
    rows = [
        [point, f"{1e3 * s:.1f}", f"{1e3 * expected:.1f}", f"{o:+.1%}", a]
        for point, s, expected, o, a in zip(points, seconds, line, off, added, strict=True)
    ]
    header = [sweep, "ms an update", "the line's", "off the line", "added cost ÷ slope"]
    farthest = f"at most {np.abs(off).max():.1%} off"
    return f"{sweep}: {1e3 * start:.1f} ms + {1e3 * slope:.4f} ms each, {farthest}\n\n{table(header, rows)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="13m", help="its layers are replaced")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=[*SWEEPS])
    parser.add_argument("--small", action="store_true", help="few and small points")
    parser.add_argument("--turns", type=int, default=3, help="of every point in a process")
    parser.add_argument("--rounds", type=int, default=2)
    flags = parser.parse_args()
    sweeps = SMALL if flags.small else SWEEPS
    arguments = {sweep: (sweep, sweeps[sweep], flags.shape, flags.dtype, flags.turns) for sweep in flags.sweeps}
    results = alternate(arguments, measure, flags.rounds)
    usual = f"{USUAL['tokens']} tokens in rows of {ROW}, {USUAL['layers']} layers, prefix {USUAL['prefix']}"
    title = f"{flags.shape}, {flags.dtype}; where it is not said otherwise {usual}; {flags.rounds} rounds"
    text = "\n\n".join(tell(sweep, sweeps[sweep], runs) for sweep, runs in results.items())
    publish(f"scaling_{flags.shape}_{flags.dtype}", f"{title}\n\n{text}", results)


if __name__ == "__main__":
    main()
