"""Peak memory of training, measured; or that of one device of a mesh, as the compiler reports it, without weights.

python -m benchmarks.memory --shape 110m --ways jaxprefix:float32 torch_ref:float32 peft:float32
python -m benchmarks.memory --abstract --shape 20b --dtype bfloat16 --mesh fsdp=8 tensor=8 [--gpu]

With --abstract, an update of 8 rows of 2048 tokens is compiled for as many devices as the mesh has. With --gpu these
are H100s, which need not exist, but JAX's CUDA plugin must (pip install '.[cuda13]'); cuDNN's workspace is left out.
Otherwise they are CPUs, with operations ordered to save memory, as on accelerators: by default, the compiler for CPUs
starts everything as early as it can, and holds more.
"""

import argparse
import contextlib
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import Turn, alternate, peak_device_memory, peak_memory, platform_of, take_turns
from benchmarks.report import add_compute, compute_of, compute_suffix, compute_title, gib, largest, publish, table
from benchmarks.shapes import SAMPLE, SHAPES, make_folder, model_config
from benchmarks.train import WAYS, arguments_of
from jaxprefix.config import TrainConfig, mesh_sizes

DEVICE_BYTES = 80e9
H100 = Path(__file__).parent / "h100.txtpb"
SAVING_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
ARRAY_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def account(mesh: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Compile an update for a mesh, and return the bytes that it takes on each device."""
    # JAX reads both variables when it finds its devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SAVING_ORDER}"
    os.environ["JAX_PLATFORMS"] = "cpu"  # asked for a GPU that is not there, JAX would not find the plugin either
    import jax

    from jaxprefix.check import compiled_update
    from jaxprefix.data.shapes import PaddedShape

    names = (flags.shape, Path(), flags.shape)
    config = TrainConfig(*names, dtype=flags.dtype, mesh=mesh, compute=compute_of(flags))
    n_devices = math.prod((mesh_sizes(mesh) or {}).values())
    jax.config.update("jax_num_cpu_devices", n_devices)
    started = time.perf_counter()
    with h100s(n_devices) if flags.gpu else contextlib.nullcontext():
        compiled = compiled_update(config, model_config(SHAPES[flags.shape]), PaddedShape(flags.rows, flags.tokens))
    analysis, program = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None
    assert program is not None
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    largest = largest_array(program)
    return {**parts, "total": sum(parts.values()), "largest": largest, "seconds": time.perf_counter() - started}


def h100s(n_devices: int) -> contextlib.AbstractContextManager[None]:
    """Compile for this many H100s of one host, from a description of them."""
    from jax.experimental import topologies

    from jaxprefix.machine.devices import compiling_for

    try:
        host = topologies.get_topology_desc(
            platform="cuda", target_config=H100.read_text(), topology=f"1x1x{n_devices}"
        )
    except NotImplementedError as error:
        raise SystemExit("--gpu needs JAX's CUDA plugin: pip install '.[cuda13]'") from error
    return compiling_for(host.devices)


def largest_array(program: str) -> str:
    """Return the type and shape of the largest array that a compiled program names outside its fusions."""
    fused = set(re.findall(r" fusion\(.*?calls=(%[\w.-]+)", program))
    computations = [part for part in program.split("\n\n") if part.split(" ")[0] not in fused]
    found = {match.groups() for part in computations for match in re.finditer(r"= (\w+)\[([\d,]+)\]", part)}
    sizes = {
        f"{dtype}[{axes}]": ARRAY_BYTES[dtype] * math.prod(map(int, axes.split(",")))
        for dtype, axes in found
        if dtype in ARRAY_BYTES
    }
    return max(sizes, key=sizes.__getitem__)


def publish_account(flags: argparse.Namespace) -> None:
    """Print and write the table of accounts, a line for each mesh."""
    results = alternate({mesh: (mesh, flags) for mesh in flags.mesh}, account, n_rounds=1)
    parts = ("arguments", "outputs", "temporaries", "total")
    rows = [
        [mesh, *(gib(r[name]) for name in parts), f"{r['total'] / DEVICE_BYTES:.2f}", f"`{r['largest']}`"]
        for mesh, (r,) in results.items()
    ]
    header = ["mesh", *(f"{name}, GiB" for name in parts), "÷ 80 GB", "largest array"]
    title = f"{flags.shape}, {flags.dtype}, --remat {flags.remat}, {flags.rows} rows × {flags.tokens} tokens, each "
    title += "H100" if flags.gpu else "CPU"
    title += ", --scan_layers" if flags.scan_layers else ""
    name = f"memory_abstract_{flags.shape}_{flags.dtype}_{flags.remat}"
    name += ("_scan" if flags.scan_layers else "") + ("_h100" if flags.gpu else "")
    publish(name, f"{title}\n\n{table(header, rows)}", results)


def measure(way: str, config: TrainConfig) -> Iterator[Turn | str]:
    """Train in this process, and yield its peaks; those of `benchmarks.train` include what measures the matrix rate.

    The peak after one update is for one batch's shape; caches for others may still grow. On a GPU it is the GPU's.
    """
    training = WAYS[way](config)
    yield platform_of(way)
    training.update(0)()
    after_one = peak_device_memory(way) or peak_memory()
    for number in range(1, config.n_training_steps):
        training.update(number)()
    yield {"after_one": after_one, "peak_bytes": peak_memory(), "device_peak_bytes": peak_device_memory(way)}


def publish_measured(flags: argparse.Namespace) -> None:
    """Print and write the table of measured peaks, a line for each way."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "base", SHAPES[flags.shape])
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        sizes = {"train_data_size": 4 * flags.updates, "n_training_steps": flags.updates, "n_epochs": 1}
        config = TrainConfig(str(folder), flags.data, "benchmark", compute=compute_of(flags), **sizes)
        results = take_turns(arguments_of(flags.ways, config), measure, 1, flags.rounds)
    rows = []
    for way, turns in results.items():
        # torch_ref keeps its weights in float32, and autocasts.
        held = weights if way.endswith("float32") or way.startswith("torch_ref") else weights // 2
        of_host, of_gpu = (largest(turns, field) for field in ("peak_bytes", "device_peak_bytes"))
        bytes_of = (held, largest(turns, "after_one"), of_host, of_gpu)
        rows.append([way, *map(gib, bytes_of), f"{(of_gpu or of_host) / held:.2f}"])
    header = ["training", "weights, GiB", "after one update", "host peak, GiB", "GPU peak, GiB", "peak ÷ weights"]
    title = f"{flags.shape}, batches of 4 examples, {flags.rounds} rounds of {flags.updates} updates"
    title += compute_title(config.compute)
    publish(f"memory_{flags.shape}{compute_suffix(config.compute)}", f"{title}\n\n{table(header, rows)}", results)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: 110m, with --abstract 20b")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--ways", nargs="+", default=["jaxprefix:float32", "torch_ref:float32", "peft:float32"])
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--abstract", action="store_true", help="compile for shapes instead of training")
    parser.add_argument("--mesh", nargs="+", default=["fsdp=8", "tensor=8", "data=1"], help="with --abstract")
    parser.add_argument("--dtype", default="bfloat16", help="with --abstract")
    add_compute(parser)
    parser.set_defaults(remat=None)  # block with --abstract
    parser.add_argument("--gpu", action="store_true", help="with --abstract: for H100s, which need not be there")
    parser.add_argument("--rows", type=int, default=8, help="with --abstract")
    parser.add_argument("--tokens", type=int, default=2048, help="with --abstract: of each row")
    flags = parser.parse_args()
    flags.shape = flags.shape or ("20b" if flags.abstract else "110m")
    flags.remat = flags.remat or ("block" if flags.abstract else "elementwise")
    (publish_account if flags.abstract else publish_measured)(flags)


if __name__ == "__main__":
    main()
