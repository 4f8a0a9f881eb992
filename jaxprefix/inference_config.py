"""The settings of `jaxprefix generate` and `evaluate`, as frozen dataclasses; tyro makes the command line from them."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import tyro

from convert.errors import InputError
from jaxprefix.config import SEED_LIMIT, DType, mesh_problems
from jaxprefix.recipe import RecipeName
from jaxprefix.settings import convert_and_check, range_problems

LEAST_TEMPERATURE = 1e-6
"""Low enough to be greedy; far below it, the division would overflow."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    decode_method: Literal["nucleus", "sample", "greedy"] = "nucleus"
    """`greedy`: the likeliest token. `sample`: from the whole softmax. `nucleus`: from what top_k and top_p leave."""
    max_output_len: int = 128
    """Maximum number of new tokens per prompt."""
    top_p: float = 0.95
    """nucleus: probability mass to keep; 0 and 1 keep all."""
    top_k: int = 50
    """nucleus: maximum number of tokens to keep; 0 keeps all."""
    temperature: float = 1.0
    """sample and nucleus: divides the logits."""
    recipe: RecipeName = "default"
    """`rinna` follows the original in the nucleus, GPT-2's positions, evaluate's chunks and means (see the README)."""

    def __post_init__(self) -> None:
        convert_and_check(self, "decoding")
        problems = range_problems(self, ["max_output_len"], ["top_k"])
        if not 0 <= self.top_p <= 1:
            problems.append(f"--top_p must be between 0 and 1, is {self.top_p}")
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            problems.append(f"--temperature must be finite and at least {LEAST_TEMPERATURE}, is {self.temperature}")
        if problems:
            raise InputError.all("decoding:", problems)


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """The settings that generate and evaluate share."""

    pretrained_model_dir: str
    """Base model: a folder in the hub's layout, or a hub id."""
    prefix_checkpoint_path: Path | None = None
    """Run folder, adapter folder or prefix file; leave it out to use the plain base model."""
    prompt_file: Path | None = None
    """File with one prompt per line; in .jsonl, an object with a `prompt`."""
    json: bool = False
    """Print JSON instead of text: an object for each prompt, or one object with all measures."""
    seed: int = 42
    """Seed for sampling."""
    model_type: Literal["gpt-neox", "gpt"] | None = None
    """Architecture of the base model: if given, config.json must agree; by default, config.json decides."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    batch_size: int = 16
    """Prompts at a time, or examples in evaluate's loss; prompts are rounded up to a multiple of the mesh's `data`."""
    dtype: DType | None = None
    """Type of the base model's weights and activations; by default that of the prefix's run, else float32."""
    mesh: str | None = None
    """Devices by axis, as in training: tensor=8 for a base model too large for one device; without it, one device."""
    decode: tyro.conf.OmitArgPrefixes[DecodeConfig] = DecodeConfig()

    def common_problems(self, command: str) -> list[str]:
        """Return what is wrong with these settings. Raises InputError for values of a wrong type."""
        convert_and_check(self, command)
        problems = range_problems(self, ["batch_size"])
        if not 0 <= self.seed < SEED_LIMIT:
            problems.append(f"--seed must be at least 0 and below {SEED_LIMIT}, is {self.seed}")
        return problems + mesh_problems(self.mesh)


@dataclasses.dataclass(frozen=True)
class GenerateConfig(InferenceConfig):
    """Continue prompts with a base model and a trained prefix. Without a prompt, asks for one line after another."""

    prompt: list[str] = dataclasses.field(default_factory=list)
    """One or more texts to continue; --prompt=-a if one begins with a dash."""
    compare: bool = False
    """Show the plain base model's continuation beside the prefix's."""
    timing: bool = False
    """Print each batch's tokens per second on stderr; the first batch of a shape includes compiling."""
    prefix_seq_len: int | None = None
    """Prefix length to expect; the prefix file holds its own."""

    def __post_init__(self) -> None:
        problems = self.common_problems("generate")
        if self.compare and self.prefix_checkpoint_path is None:
            problems.append("--compare needs --prefix_checkpoint_path")
        if self.prompt and self.prompt_file:
            problems.append("--prompt and --prompt_file exclude each other")
        if problems:
            raise InputError.all("generate:", problems)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(InferenceConfig):
    """Measure loss and ppl on a file, and the share of generated sentences that end with the suffix.

    Sentences are sampled after the prompts in --prompt_file, or without a prompt.
    """

    data_filepath: Path | None = None
    """JSON Lines to compute loss and ppl on, as in training."""
    suffix: str | None = None
    """The task's suffix; by default the one that the prefix was trained with, else " 😃"."""
    max_seq_len: int | None = None
    """Longest chunk of a `text` document, in tokens; by default that of the prefix's training, else 64."""
    skip_bad_lines: bool = False
    """Leave out and count unreadable lines and examples too long for the base model, instead of refusing the data."""
    n_samples: int = 100
    """Texts to sample; prompts are used in turn. 0 skips the suffix rate."""
    decode: tyro.conf.OmitArgPrefixes[DecodeConfig] = DecodeConfig(max_output_len=60)

    def __post_init__(self) -> None:
        problems = self.common_problems("evaluate") + range_problems(self, ["max_seq_len"], ["n_samples"])
        if not self.n_samples and self.data_filepath is None:
            problems.append("nothing to measure: neither --data_filepath nor --n_samples")
        if self.n_samples and self.suffix is not None and not self.suffix.strip():
            problems.append("--suffix is blank, so there is no suffix rate; --n_samples 0 skips it")
        if problems:
            raise InputError.all("evaluate:", problems)
