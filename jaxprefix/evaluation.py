"""What `jaxprefix evaluate` does: checks what is quick to read, then measures with and without the prefix."""

import math

from convert.errors import InputError, RunError
from jaxprefix.base_folder import BaseFolder
from jaxprefix.config import mesh_sizes
from jaxprefix.data.examples import Chunking, Examples
from jaxprefix.data.rows import label_counts
from jaxprefix.decode import check_prompts, continuation, generate_ids, overflow_hint
from jaxprefix.inference import as_trained, load_base, on_its_devices, open_with_prefix, read_prompts
from jaxprefix.inference_config import EvaluateConfig
from jaxprefix.inputs import check_rows, usable_examples
from jaxprefix.machine.screen import tell
from jaxprefix.metrics import evaluation_batches, loss_and_ppl
from jaxprefix.prefix import Prefix
from jaxprefix.recipe import RECIPES, Recipe
from jaxprefix.sharding import make_mesh
from jaxprefix.suffix_rate import AT_MARKS, NOWHERE, suffix_rate, without_cut_end
from jaxprefix.tokenizer import Tokenizer

Report = dict[str, dict[str, float | int]]
"""Measures by name, for the base model with the prefix and without it."""


def evaluate(config: EvaluateConfig) -> Report:
    """Measure what the settings ask for.

    Raises InputError, before the base model's weights are read unless they are at fault, and RunError for a loss that
    is not finite or when memory is too small.
    """
    with on_its_devices(config):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Report:
    mesh = make_mesh(mesh_sizes(config.mesh))
    base, prefix = open_with_prefix(config)
    suffix: str = as_trained(config, "suffix")
    recipe = RECIPES[config.decode.recipe]
    settings = ["dtype"] if config.data_filepath is None else ["max_seq_len", "dtype"]
    tell(f"suffix: {suffix!r}, " + ", ".join(f"{name}: {as_trained(config, name)}" for name in settings))
    prompts, ending = _encoded_prompts(config, base, prefix, suffix) if config.n_samples else ([], "")
    examples = None if config.data_filepath is None else _examples(config, base, prefix, suffix, recipe)
    n_tokens = 0 if examples is None else int(label_counts(examples).sum())
    model = load_base(config, base, mesh)

    def sampled(prompt: list[int], made: list[int]) -> str:
        text = continuation(base.tokenizer, prompt, made)
        return without_cut_end(text, ending) if len(made) == config.decode.max_output_len else f"{text}\n"

    keeps_newlines = "\n" in base.tokenizer.decode(base.tokenizer.encode("。\n。"))
    ends = NOWHERE if keeps_newlines else AT_MARKS
    report: Report = {}
    ways = {"without_prefix": None} if prefix is None else {"with_prefix": prefix, "without_prefix": None}
    for way, used in ways.items():
        values = report[way] = {}
        if examples is not None:
            batches = evaluation_batches(examples, base.tokenizer, config.batch_size, mesh, recipe.packs_dev)
            values |= loss_and_ppl(model, used, batches, mesh, recipe)
            if not math.isfinite(values["loss"]):
                told = overflow_hint(model.embed.weight.dtype.name)
                raise RunError(f"the loss {way.replace('_', ' ')} is {values['loss']}: {told}")
            values["tokens"] = n_tokens
        if prompts:
            made_ids = generate_ids(model, base.tokenizer, prompts, used, config.seed, config.batch_size, config.decode)
            values |= suffix_rate(map(sampled, prompts, made_ids), ending, ends)
    return report


def _encoded_prompts(
    config: EvaluateConfig, base: BaseFolder, prefix: Prefix | None, suffix: str
) -> tuple[list[list[int]], str]:
    """Return the ids of n_samples prompts, the given ones in turn, and the suffix as generated texts will have it."""
    given = read_prompts(config.prompt_file) if config.prompt_file else [""]
    encoded = [base.tokenizer.encode(prompt) for prompt in given]
    ending = as_generated(suffix, base.tokenizer)
    check_prompts(base.config, base.tokenizer, encoded, prefix, config.decode)
    return [encoded[i % len(encoded)] for i in range(config.n_samples)], ending


def _examples(config: EvaluateConfig, base: BaseFolder, prefix: Prefix | None, suffix: str, recipe: Recipe) -> Examples:
    """Return the data's examples, checked to fit behind the prefix; print what was skipped or is unknown."""
    assert config.data_filepath is not None
    chunking = Chunking(base.tokenizer, suffix, as_trained(config, "max_seq_len"), recipe, config.skip_bad_lines)
    prefix_len = base.config.prefix_length(prefix)
    examples = usable_examples(config.data_filepath, chunking, base.config, prefix_len)
    for line in (*examples.tally.report(config.data_filepath), *examples.report_unknown(base.tokenizer.unk_id)):
        tell(line)
    check_rows(base.config, base.tokenizer, prefix_len, config.data_filepath, examples)
    return examples


def as_generated(suffix: str, tokenizer: Tokenizer) -> str:
    """Return a suffix as it appears, normalised, in generated texts. Raises InputError if no sentence can end so."""
    generated = tokenizer.decode(tokenizer.encode(suffix))
    flaw = tokenizer.why_unlearnable(suffix)
    if flaw is None and not generated.strip():
        flaw = "is blank in generated texts"
    elif flaw is None and "\n" in generated.strip():
        flaw = "spans several lines, but a sentence is one line"
    if flaw:
        raise InputError(f"the suffix {suffix!r} {flaw}; --n_samples 0 skips the suffix rate")
    return generated
