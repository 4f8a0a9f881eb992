"""The command line: jaxprefix train | generate | evaluate | convert.

What a user can get wrong ends in plain lines on stderr and exit code 2; a stopped run exits with 130.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from convert.errors import InputError
from jaxprefix.config import ConvertConfig, EvaluateConfig, GenerateConfig, TrainConfig

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        settings = tyro.cli(Command, prog="jaxprefix", args=arguments, use_underscores=True)
        if isinstance(settings, TrainConfig):
            return _train(settings)
        if isinstance(settings, GenerateConfig):
            return _generate(settings)
        if isinstance(settings, EvaluateConfig):
            return _evaluate(settings)
        return _convert(settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _train(config: TrainConfig) -> int:
    from jaxprefix.train import train

    result = train(config)
    if not result.finished:
        return 130
    if config.save_model:
        base = config.pretrained_model_dir
        print(f"best prefix: {result.run_dir / 'prefix'}  (dev loss {result.best_dev_loss:.4f})\nTry it:")
        print(f"  jaxprefix generate --pretrained_model_dir {base} --prefix_checkpoint_path {result.run_dir} --compare")
    return 0


def _generate(config: GenerateConfig) -> int:
    import dataclasses

    from jaxprefix.generate import generate
    from jaxprefix.models import load_model
    from jaxprefix.prefix import load_prefix
    from jaxprefix.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.pretrained_model_dir)
    model = load_model(config.pretrained_model_dir, config.dtype)
    prefix = None
    if config.prefix_checkpoint_path is not None:
        prefix = load_prefix(config.prefix_checkpoint_path, model.config, tokenizer)
        if config.prefix_seq_len not in (None, prefix.shape[2]):
            raise InputError(
                f"{config.prefix_checkpoint_path}: prefix length is {prefix.shape[2]}, --prefix_seq_len says "
                f"{config.prefix_seq_len}"
            )

    def answer(prompts: list[str]) -> Iterator[dict[str, str]]:
        ways = {"continuation": prefix, **({"continuation_without_prefix": None} if config.compare else {})}
        decode = dataclasses.asdict(config.decode)
        made = {way: generate(model, tokenizer, prompts, p, config.seed, **decode) for way, p in ways.items()}
        for index, prompt in enumerate(prompts):
            yield {"prompt": prompt, **{way: texts[index] for way, texts in made.items()}}

    prompts = config.prompt or (read_prompts(config.prompt_file) if config.prompt_file else None)
    batches = [prompts] if prompts else prompt_loop()
    for batch in batches:
        for result in answer(batch):
            print(json.dumps(result, ensure_ascii=False) if config.json else _as_text(result), flush=True)
    return 0


def _as_text(result: dict[str, str]) -> str:
    text = result["prompt"] + result["continuation"]
    if "continuation_without_prefix" not in result:
        return text
    return f"with prefix:    {text}\nwithout prefix: {result['prompt'] + result['continuation_without_prefix']}\n"


def prompt_loop() -> Iterator[list[str]]:
    """Yield what the user types, a line at a time, until Ctrl-D or Ctrl-C."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type the beginning of a text; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            yield [input("> " if interactive else "")]
        except (EOFError, KeyboardInterrupt):
            return


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line; blank lines are left out."""
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error})") from error
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def _evaluate(config: EvaluateConfig) -> int:
    from jaxprefix.config import RECIPES
    from jaxprefix.data import read_examples
    from jaxprefix.evaluate import dev_batches, dev_loss, suffix_rate
    from jaxprefix.generate import sample_texts
    from jaxprefix.models import load_model
    from jaxprefix.prefix import load_prefix
    from jaxprefix.tokenizer import load_tokenizer

    recipe = RECIPES[config.decode.recipe]
    tokenizer = load_tokenizer(config.pretrained_model_dir)
    model = load_model(config.pretrained_model_dir, config.dtype)
    ways: dict[str, Any] = {"without_prefix": None}
    if config.prefix_checkpoint_path is not None:
        ways = {"with_prefix": load_prefix(config.prefix_checkpoint_path, model.config, tokenizer), **ways}
    report: dict[str, dict[str, float | int]] = {way: {} for way in ways}
    if config.data_filepath is not None:
        examples = read_examples(
            config.data_filepath, tokenizer, suffix=config.suffix, max_seq_len=config.max_seq_len, recipe=recipe
        )
        batches = dev_batches(examples, tokenizer, config.batch_size)
        for way, prefix in ways.items():
            report[way] |= dev_loss(model, prefix, batches, recipe)
    if config.n_samples:
        prompts = read_prompts(config.prompt_file) if config.prompt_file else [""]
        for way, prefix in ways.items():
            options = (config.n_samples, prefix, config.seed, config.decode, config.batch_size)
            report[way] |= suffix_rate(list(sample_texts(model, tokenizer, prompts, *options)), config.suffix)
    if config.json:
        print(json.dumps(report))
    for way, values in report.items() if not config.json else ():
        print(f"{way + ':':16}" + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))
    return 0


def _convert(config: ConvertConfig) -> int:
    from convert.prefix import read_prefix, write_adapter, write_weight

    folded, base = read_prefix(config.source)
    if config.target.suffix in (".weight", ".checkpoint"):
        write_weight(config.target, folded)
    elif config.pretrained_model_dir is not None:
        from jaxprefix.hub import resolve_folder
        from jaxprefix.models.config import read_model_config
        from jaxprefix.prefix import load_prefix, save_prefix
        from jaxprefix.tokenizer import load_tokenizer

        folder = resolve_folder(config.pretrained_model_dir)
        model_config = read_model_config(folder, name=config.pretrained_model_dir)
        tokenizer = load_tokenizer(folder)
        save_prefix(config.target, load_prefix(config.source, model_config, tokenizer), model_config, tokenizer)
    elif {"n_layer", "n_head"} <= base.keys():
        write_adapter(config.target, folded, int(base["n_layer"]), int(base["n_head"]), base)
    else:
        raise InputError(f"{config.source}: does not say what base model it is for; give --pretrained_model_dir")
    print(f"{config.target}: prefix of {folded.shape[0]} positions, {folded.nbytes:,} bytes")
    return 0


def entry_point() -> None:
    """Run as a program."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
