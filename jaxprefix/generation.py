"""What `jaxprefix generate` does: continues the prompts that it is given, or one typed line after another."""

import io
import json
import sys
from collections.abc import Iterator

from convert.errors import InputError
from jaxprefix.config import mesh_sizes
from jaxprefix.decode import BatchTiming, check_prompts, stream
from jaxprefix.inference import load_base, on_its_devices, open_with_prefix, read_prompts
from jaxprefix.inference_config import GenerateConfig
from jaxprefix.machine.screen import tell, warn
from jaxprefix.prefix import check_length
from jaxprefix.sharding import make_mesh


def continue_prompts(config: GenerateConfig) -> None:
    """Print continuations of the prompts, or of one typed line after another.

    Raises InputError, before the base model's weights are read unless they are at fault, and RunError when memory is
    too small. An InputError about a typed line is printed instead.
    """
    with on_its_devices(config):
        _continue_prompts(config)


def _continue_prompts(config: GenerateConfig) -> None:
    prompts = config.prompt or (read_prompts(config.prompt_file) if config.prompt_file else [])
    if not prompts and sys.stdin is None:
        raise InputError("neither --prompt nor --prompt_file is given, and standard input is closed")
    mesh = make_mesh(mesh_sizes(config.mesh))
    base, prefix = open_with_prefix(config)
    if config.prefix_checkpoint_path and prefix is not None and config.prefix_seq_len is not None:
        check_length(config.prefix_checkpoint_path, prefix, config.prefix_seq_len)
    encode = base.tokenizer.encode
    check_prompts(base.config, base.tokenizer, map(encode, prompts), prefix, config.decode)
    model = load_base(config, base, mesh)
    ways = {"continuation": prefix, **({"continuation_without_prefix": None} if config.compare else {})}
    ascii_only = "utf" not in str(getattr(sys.stdout, "encoding", "")).lower()

    def answer(prompts: list[str], first_index: int = 0) -> None:
        if n_unknown := sum(base.tokenizer.unk_id in encode(prompt) for prompt in prompts):
            warn(f"{n_unknown} prompt(s) hold text unknown to the tokenizer")
        timings = {way: list[BatchTiming]() for way in ways}
        options = (config.seed, config.batch_size, config.decode)
        streams = [
            stream(model, base.tokenizer, prompts, used, *options, timings[way], first_index)
            for way, used in ways.items()
        ]
        for prompt, *made in zip(prompts, *streams, strict=True):
            result = {"prompt": prompt, **dict(zip(ways, made, strict=True))}
            print(json.dumps(result, ensure_ascii=ascii_only) if config.json else _as_text(result), flush=True)
        if config.timing:
            _print_timings(timings)

    if prompts:
        return answer(prompts)
    for index, prompt in enumerate(_typed_lines()):
        try:
            answer([prompt], index)
        except InputError as error:
            tell(f"error: {error}")


def _as_text(result: dict[str, str]) -> str:
    text = result["prompt"] + result["continuation"]
    if "continuation_without_prefix" not in result:
        return text
    return f"with prefix:    {text}\nwithout prefix: {result['prompt'] + result['continuation_without_prefix']}\n"


def _print_timings(timings: dict[str, list[BatchTiming]]) -> None:
    for way, batches in timings.items():
        which = f"{way.replace('_', ' ')}: " if len(timings) > 1 else ""
        for n_rows, n_tokens, seconds in batches:
            speed = f"{n_rows} rows, {n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s"
            tell(which + speed)


def _typed_lines() -> Iterator[str]:
    """Yield what the user types, a line at a time, until Ctrl-D or Ctrl-C."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that the tokenizer refuses a line that is not text
    interactive = sys.stdin.isatty()
    shown = interactive and sys.stdout is not None and sys.stdout.isatty()
    if interactive:
        tell("Type the beginning of a text; Ctrl-D ends.")
    while True:
        if interactive and not shown:
            tell("> ", end="")
        try:
            yield input("> " if shown else "").removesuffix("\r")
        except (EOFError, KeyboardInterrupt):
            return
