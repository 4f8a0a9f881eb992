"""What `jaxprefix evaluate` does: checks what is quick to read, then measures with and without the prefix."""

import math
import sys
from typing import TypeVar

from convert.errors import InputError, RunError
from jaxprefix.config import TrainConfig, mesh_sizes
from jaxprefix.decode import check_prompts, continuation, generate_ids, overflow_hint
from jaxprefix.examples import Chunking, Examples
from jaxprefix.inference_config import EvaluateConfig
from jaxprefix.inputs import check_rows, open_with_prefix, read_prompts
from jaxprefix.metrics import dev_batches, dev_loss
from jaxprefix.models import load_model
from jaxprefix.recipe import RECIPES
from jaxprefix.run_description import setting_of
from jaxprefix.sentences import suffix_rate, without_cut_end
from jaxprefix.sharding import base_sharding, make_mesh
from jaxprefix.token_cache import load_examples
from jaxprefix.tokenizer import Tokenizer

Report = dict[str, dict[str, float | int]]
"""Measures by name, for the base model with the prefix and without it."""
Setting = TypeVar("Setting", str, int)


def evaluate(config: EvaluateConfig) -> Report:
    """Measure what the settings ask for, on the devices that `compiling_for` names.

    Raises InputError before the base model's weights are read, and RunError for a loss that is not finite.
    """
    mesh = make_mesh(mesh_sizes(config.mesh))
    base, prefix = open_with_prefix(config)
    recipe = RECIPES[config.decode.recipe]
    suffix, max_seq_len = _as_trained(config, "suffix", str), _as_trained(config, "max_seq_len", int)
    print(f"suffix: {suffix!r}", file=sys.stderr)

    prompts, generated_suffix = list[list[int]](), ""
    if config.n_samples:
        given = read_prompts(config.prompt_file) if config.prompt_file else [""]
        encoded = [base.tokenizer.encode(prompt) for prompt in given]
        prompts = [encoded[i % len(encoded)] for i in range(config.n_samples)]
        generated_suffix = as_generated(suffix, base.tokenizer)
        check_prompts(base.config, base.tokenizer, encoded, prefix, config.decode)
    examples: Examples | None = None
    if config.data_filepath is not None:
        chunking = Chunking(base.tokenizer, suffix, max_seq_len, recipe, config.skip_bad_lines)
        examples = load_examples(config.data_filepath, chunking)
        for line in (*examples.skipped.report(config.data_filepath), *examples.report_unknown(base.tokenizer.unk_id)):
            print(line, file=sys.stderr)
        check_rows(base.config, base.tokenizer, base.config.prefix_length(prefix), examples)

    model = load_model(base.path, config.dtype, base_sharding(mesh, base.config.n_head), base.config)

    def sampled(prompt: list[int], made: list[int]) -> str:
        text = continuation(base.tokenizer, prompt, made)
        cut_off = len(made) == config.decode.max_output_len
        return without_cut_end(text, generated_suffix) if cut_off else text

    report: Report = {}
    ways = {"without_prefix": None} if prefix is None else {"with_prefix": prefix, "without_prefix": None}
    for way, used in ways.items():
        values = report[way] = {}
        if examples is not None:
            batches = dev_batches(examples, base.tokenizer, config.batch_size, mesh, recipe.packs_dev)
            values |= dev_loss(model, used, batches, recipe, mesh)
            if not math.isfinite(values["loss"]):
                raise RunError(f"the loss {way.replace('_', ' ')} is {values['loss']}: {overflow_hint(config.dtype)}")
        if prompts:
            made_ids = generate_ids(model, base.tokenizer, prompts, used, config.seed, config.batch_size, config.decode)
            values |= suffix_rate(map(sampled, prompts, made_ids), generated_suffix)
    return report


def as_generated(suffix: str, tokenizer: Tokenizer) -> str:
    """Return a suffix as it appears, normalised, in generated texts. Raises InputError if no sentence can end so."""
    ids = tokenizer.encode(suffix)
    if tokenizer.unk_id in ids:
        raise InputError(
            f"the suffix {suffix!r} holds text unknown to the tokenizer; --n_samples 0 skips the suffix rate"
        )
    generated = tokenizer.decode(ids)
    if not generated.strip():
        raise InputError(f"the suffix {suffix!r} is blank in generated texts; --n_samples 0 skips the suffix rate")
    if "\n" in generated.strip():
        raise InputError(
            f"the suffix {suffix!r} spans several lines, but a sentence is one line; "
            "--n_samples 0 skips the suffix rate"
        )
    return generated


def _as_trained(config: EvaluateConfig, name: str, kind: type[Setting]) -> Setting:
    """Return a setting if it is given, else that of the prefix's run, else train's default."""
    if (given := getattr(config, name)) is not None:
        return given
    found = setting_of(config.prefix_checkpoint_path, name)
    if found is None:
        return getattr(TrainConfig, name)
    if type(found) is not kind or (isinstance(found, int) and found < 1):
        raise InputError(f"{config.prefix_checkpoint_path}: its config.json has an invalid {name}, {found!r}")
    return found
