"""The settings of train, check and convert, as frozen dataclasses; tyro makes the command line from them.

Flag names and defaults are the original's wherever it has the flag, except for those that docs/original.md names.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from convert.errors import InputError
from jaxprefix.recipe import RecipeName
from jaxprefix.settings import convert_and_check, range_problems

SEED_LIMIT = 2**32
MESH_AXES = ("data", "fsdp", "tensor")

AttentionMethod = Literal["auto", "dense", "cudnn"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a base model is computed; the results are the same, up to rounding."""

    attention: AttentionMethod = "auto"
    """`cudnn`: flash attention, for NVIDIA GPUs in half precision; `dense`: plain products; `auto`: the faster one."""
    remat: Literal["elementwise", "block"] = "elementwise"
    """What the backward pass computes again to save memory: layer norms and activations, or all of a layer."""
    scan_layers: bool = False
    """Compile one layer and loop over it: compiles faster, runs slower, saves memory on a CPU; for very deep models."""

    def __post_init__(self) -> None:
        convert_and_check(self, "computing")


class AdamW(NamedTuple):
    """The settings of the optimizer that are constants of a compiled update."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip: float


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Which processes make a run together; this one alone unless something is given. See docs/launch.md."""

    distributed: bool = False
    """One of several processes that SLURM, Open MPI, Kubernetes or a TPU pod started; detects the next three flags."""
    coordinator_address: str | None = None
    """host:port at which process 0 waits for the others."""
    num_processes: int | None = None
    """How many processes make the run."""
    process_id: int | None = None
    """Which of them this is, counted from 0."""
    stall_minutes: float = 30.0
    """End a process if no start, update, evaluation or save has finished for this many minutes: another one hangs."""

    def __post_init__(self) -> None:
        convert_and_check(self, "processes")
        problems = range_problems(self, ["stall_minutes"])
        named = ("coordinator_address", "num_processes", "process_id")
        missing = [f"--{name}" for name in named if getattr(self, name) is None]
        if self.distributed and len(missing) < len(named):
            problems.append(f"--distributed detects {', '.join(f'--{name}' for name in named)} itself; leave them out")
        elif 0 < len(missing) < len(named):
            problems.append(f"a run of several processes also needs {' and '.join(missing)}")
        if self.coordinator_address is not None:
            host, _, port = self.coordinator_address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                problems.append(f"--coordinator_address must be host:port, found {self.coordinator_address!r}")
        if self.num_processes is not None and self.num_processes < 1:
            problems.append(f"--num_processes must be positive, is {self.num_processes}")
        elif self.process_id is not None and not 0 <= self.process_id < (self.num_processes or math.inf):
            problems.append(f"--process_id must be at least 0 and below --num_processes, is {self.process_id}")
        if problems:
            raise InputError.all("processes:", problems)

    @property
    def several(self) -> bool:
        """Tell whether there are other processes to join."""
        return self.distributed or self.coordinator_address is not None


def mesh_sizes(mesh: str | None) -> dict[str, int] | None:
    """Return the number of devices along each axis in --mesh; None without it, or if it cannot be read."""
    parts = [part.partition("=") for part in (mesh or "").split(",")]
    sizes = {axis: int(size) for axis, _, size in parts if axis in MESH_AXES and size.isdecimal() and int(size) > 0}
    return sizes if len(sizes) == len(parts) else None


def mesh_problems(mesh: str | None) -> list[str]:
    """Return what is wrong with --mesh."""
    if mesh is None or mesh_sizes(mesh) is not None:
        return []
    return [f"--mesh must be axis=size,… with axes from {', '.join(MESH_AXES)}; found {mesh!r}"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a prefix for a frozen base model."""

    command = "train"  # not a setting, since it has no type
    pretrained_model_dir: str
    """Base model: a folder in the hub's layout, or a hub id."""
    data_filepath: Path
    """JSON Lines, plain or .gz; objects have `text` (sentences at newlines) or `prompt` and `completion`."""
    save_name: str
    """Name of the run; its files go to output_dir/save_name."""
    model_type: Literal["gpt-neox", "gpt"] | None = None
    """Architecture of the base model: if given, config.json must agree; by default, config.json decides."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    output_dir: Path = Path("runs")
    """Folder of all runs."""
    prefix_seq_len: int = 10
    """Positions of the prefix."""
    prefix_input_dim: int = 10
    """Width of the prefix encoder's embedding."""
    prefix_hidden_dim: int = 10
    """Width of the prefix encoder's hidden layer; 0 trains the keys and values directly."""
    suffix: str = " 😃"
    """Appended to every sentence of a `text` document; '' for none."""
    max_seq_len: int = 64
    """Longest chunk of a `text` document, in tokens."""
    skip_bad_lines: bool = False
    """Leave out and count unreadable lines and examples too long for the base model, instead of refusing the data."""
    train_data_size: int = 1000
    """Examples to train on: the first ones of the file, which must hold at least this many plus dev_data_size."""
    dev_data_size: int = 10
    """Examples to evaluate on after every epoch and at the end: the last ones of the file."""
    batch_size: int = 4
    """Examples per micro-batch, over all devices; an example without a prompt makes two rows."""
    n_accum_steps: int = 1
    """Micro-batches per update."""
    packing: bool = True
    """Lay a batch's rows end to end instead of padding each: the same loss, fewer computed positions."""
    n_training_steps: int = 50_000
    """Maximum number of updates."""
    n_epochs: int = 50
    """Maximum number of epochs."""
    n_warmup_steps: int = 0
    """Updates over which the learning rate rises to max_lr."""
    max_lr: float = 1e-4
    """Highest learning rate."""
    min_lr: float = 1e-6
    """Lowest learning rate; ignored by --recipe rinna."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.99
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the square root of Adam's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay, for everything but biases."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    seed: int = 42
    """Seed of the encoder's initialization and of the order of the data."""
    dtype: DType = "float32"
    """Type of the base model's weights and activations; float16 scales the loss dynamically; the prefix is float32."""
    bf16: bool = False
    """Same as --dtype bfloat16."""
    fp16: bool = False
    """Same as --dtype float16."""
    recipe: RecipeName = "default"
    """`rinna` reproduces the original's quirks; see the README's table."""
    checkpoint_path: Path | None = None
    """Start from another run's newest encoder or a torch file of one; with --prefix_hidden_dim 0, from any prefix, such
    as a run's best."""
    resume: Annotated[bool, tyro.conf.arg(aliases=("--resume_training",))] = False
    """Go on from the newest checkpoint of the run `save_name`."""
    overwrite: bool = False
    """Delete an earlier run of the same name first."""
    checkpoint_every_n_steps: int = 1000
    """Updates between checkpoints; one is also saved after every epoch, at the end, and on Ctrl-C."""
    checkpoint_every_minutes: float = 10.0
    """Minutes between checkpoints; whichever limit is reached first counts."""
    mesh: str | None = None
    """Devices by axis, data=2,fsdp=2,tensor=2: data and fsdp split rows, fsdp and tensor weights; default: all data."""
    save_model: bool = True
    """Save checkpoints and the best prefix."""
    save_log: bool = True
    """Save a text log, metrics.jsonl and TensorBoard scalars."""
    log_every_n_steps: int = 100
    """Updates between log points; each reports means over the updates since the last, and the newest learning rate."""
    filename_note: str = ""
    """A note appended to save_name, after a dot, in the name of the run's folder."""
    compute: tyro.conf.OmitArgPrefixes[Compute] = Compute()
    hosts: tyro.conf.OmitArgPrefixes[HostsConfig] = HostsConfig()

    def __post_init__(self) -> None:
        convert_and_check(self, self.command)
        positive = ["prefix_seq_len", "prefix_input_dim", "max_seq_len", "train_data_size", "batch_size"]
        positive += ["n_accum_steps", "n_training_steps", "n_epochs", "log_every_n_steps", "checkpoint_every_n_steps"]
        positive += ["max_lr", "adam_eps", "dev_data_size", "checkpoint_every_minutes"]
        not_negative = ["prefix_hidden_dim", "n_warmup_steps", "min_lr", "weight_decay", "grad_clip", "seed"]
        problems = range_problems(self, positive, not_negative)
        for name in ("max_lr", "min_lr", "weight_decay", "grad_clip", "adam_eps"):
            if getattr(self, name) == math.inf:
                problems.append(f"--{name} must be finite")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"--{name} must be at least 0 and below 1, is {getattr(self, name)}")
        if self.recipe == "default" and self.min_lr > self.max_lr:
            problems.append(f"--min_lr {self.min_lr} is above --max_lr {self.max_lr}")
        if self.seed >= SEED_LIMIT:
            problems.append(f"--seed must be below {SEED_LIMIT}, is {self.seed}")
        if self.bf16 and self.fp16:
            problems.append("--bf16 and --fp16 exclude each other")
        dtype = "bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype
        if self.dtype not in ("float32", dtype):
            problems.append(f"--dtype {self.dtype} contradicts --{'bf16' if self.bf16 else 'fp16'}")
        # So that `dataclasses.replace` can change dtype alone.
        for name, value in {"dtype": dtype, "bf16": False, "fp16": False}.items():
            object.__setattr__(self, name, value)
        if self.compute.attention == "cudnn" and dtype == "float32":
            problems.append("--attention cudnn needs --dtype bfloat16 or float16")
        if self.resume and self.overwrite:
            problems.append("--resume and --overwrite exclude each other")
        if self.resume and not self.save_model:
            problems.append("--resume needs checkpoints, --no_save_model saves none")
        if self.save_name in ("", ".", "..") or "/" in self.save_name + self.filename_note:
            problems.append(
                "--save_name must be a folder name and --filename_note must not contain /; together they give "
                f"{self.run_name!r}"
            )
        problems += mesh_problems(self.mesh)
        if problems:
            raise InputError.all(f"{self.command}:", problems)

    @property
    def writes(self) -> bool:
        """Tell whether the run writes any file."""
        return self.save_log or self.save_model

    @property
    def run_dir(self) -> Path:
        """Folder of this run's files."""
        return self.output_dir / self.run_name

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return ".".join(filter(None, (self.save_name, self.filename_note)))

    @property
    def encoder_sizes(self) -> tuple[int, int, int]:
        """Prefix length, embedding width and hidden width of the encoder."""
        return self.prefix_seq_len, self.prefix_input_dim, self.prefix_hidden_dim

    @property
    def adamw(self) -> AdamW:
        """The optimizer's settings."""
        return AdamW(self.adam_beta1, self.adam_beta2, self.adam_eps, self.weight_decay, self.grad_clip)


@dataclasses.dataclass(frozen=True)
class CheckConfig(TrainConfig):
    """Report what a training run with the same flags would find and need: base model, tokenizer, data, memory.

    Flags for saving and logging have no effect.
    """

    data_filepath: Path | None = None  # type: ignore[assignment]
    """JSON Lines to check, as in training."""
    save_name: str = "check"
    """Checked as in training, but not used."""
    command = "check"


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Convert a prefix, an encoder's training state, or a base model; the source is recognised by its content."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Prefix (file, adapter or run folder), training state (torch file; run folder for a .pt target) or base model."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """Prefix: .weight, .checkpoint, .safetensors, .npy, adapter folder; state: .pt or run folder; base: new folder."""
    pretrained_model_dir: str | None = None
    """Base model that the source must fit; needed to write an adapter folder unless the source states its shape."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    newest: bool = False
    """Of a run, take the prefix of its newest checkpoint instead of the best one; .pt always holds the newest state."""

    def __post_init__(self) -> None:
        convert_and_check(self, "convert")
        if self.revision is not None and self.pretrained_model_dir is None:
            raise InputError("--revision belongs to --pretrained_model_dir, which is not given")
