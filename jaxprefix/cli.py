"""The command line: jaxprefix train | generate | evaluate | convert | check.

User errors print plain lines on stderr and exit with code 2; a run that fails exits with 1. A run stopped by a signal
exits with 128 plus the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal.
"""

import atexit
import contextlib
import errno
import gc
import json
import math
import os
import shlex
import signal
import sys
from typing import Annotated

import tyro

from convert.errors import InputError, PlainError, RunError
from jaxprefix import __version__
from jaxprefix.config import CheckConfig, ConvertConfig, TrainConfig
from jaxprefix.inference_config import EvaluateConfig, GenerateConfig
from jaxprefix.machine.screen import UnfailingStream, escape_unknown, mute, tell

DESCRIPTION = "Prefix-tuning of GPT-NeoX and GPT-2 language models. jaxprefix --version prints the version."
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
DEEPSPEED_FLAGS = ("--deepspeed", "--deepspeed_config", "--deepspeed-config", "--local_rank", "--local-rank")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  never closed
    if sys.stderr is None:  # printing to None would go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.redirect_stderr(UnfailingStream(sys.stderr)):
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    escape_unknown(sys.stdout)
    try:
        if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
            print("jaxprefix", __version__)
            exit_code = 0
        else:
            exit_code = _run(arguments)
        sys.stdout.flush()  # its errors are handled below
        return exit_code
    except PlainError as error:
        return _fail(error)
    except BrokenPipeError:
        mute(sys.stdout)
        return 1
    except OSError as error:
        if error.filename is not None:  # a path that the system refuses
            return _fail(InputError(f"{error.filename}: {error.strerror}"))
        if error.errno not in NO_SPACE:
            raise
        mute(sys.stdout)
        return _fail(RunError(f"standard output cannot be written ({error.strerror})"))
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(error: PlainError) -> int:
    tell(f"error: {error}")
    return error.exit_code


def _run(arguments: list[str] | None) -> int:
    given = [argument.partition("=")[0] for argument in (sys.argv[1:] if arguments is None else arguments)]
    if of_deepspeed := [flag for flag in given if flag in DEEPSPEED_FLAGS]:
        advice = "leave them out; train uses all devices that JAX sees, CUDA_VISIBLE_DEVICES=0 leaves it one"
        raise InputError(f"{', '.join(of_deepspeed)}: flags of DeepSpeed; {advice}")
    try:
        settings = tyro.cli(Command, prog="jaxprefix", description=DESCRIPTION, args=arguments, use_underscores=True)
    except SystemExit as end:  # after --help, or wrong flags
        return int(end.code or 0)
    return _perform(settings)


def _perform(settings: Command) -> int:
    """Do what a command's settings ask for, and return its exit code."""
    if not isinstance(settings, ConvertConfig):  # converting compiles nothing
        from jaxprefix.machine import compiling

        compiling.prepare_compiling()
    match settings:
        case CheckConfig():  # first: it is a TrainConfig as well
            from jaxprefix.check import check

            for line in check(settings):
                print(line, flush=True)
        case TrainConfig():
            return _train(settings)
        case ConvertConfig():
            from jaxprefix.conversion import convert

            print(convert(settings))
        case GenerateConfig():
            from jaxprefix.generation import continue_prompts

            continue_prompts(settings)
        case EvaluateConfig():
            _evaluate(settings)
    return 0


def _train(config: TrainConfig) -> int:
    from convert.prefix import PREFIX_FOLDER
    from jaxprefix.machine.hosts import is_first, leave_soon
    from jaxprefix.train import train

    try:
        result = train(config)
    except (PlainError, OSError, KeyboardInterrupt, SystemExit) as error:
        of_signals = {KeyboardInterrupt: INTERRUPTED, SystemExit: TERMINATED}
        leave_soon(of_signals.get(type(error), getattr(error, "exit_code", InputError.exit_code)))
        raise
    if not result.finished:
        assert result.stopped_by is not None
        return 128 + result.stopped_by
    if result.best_dev_loss is None:
        raise RunError("no dev loss was finite, so no prefix was kept; lower --max_lr")
    if config.save_model and is_first():
        command = ["jaxprefix", "generate", "--pretrained_model_dir", config.pretrained_model_dir]
        command += ["--revision", config.revision] if config.revision else []
        command += ["--prefix_checkpoint_path", str(result.run_dir), "--compare"]
        hint = f"best prefix: {result.run_dir / PREFIX_FOLDER}  (dev loss {result.best_dev_loss:.4f})\nTry it:"
        try:
            print(f"{hint}\n  {shlex.join(command)}", flush=True)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            mute(sys.stdout)  # nobody reads it any more, but the run is done
    return 0


def _evaluate(config: EvaluateConfig) -> None:
    from jaxprefix.evaluation import evaluate

    report = evaluate(config)
    if config.json:  # JSON has no infinity
        finite = {way: {k: v if math.isfinite(v) else None for k, v in row.items()} for way, row in report.items()}
        print(json.dumps(finite))
    else:
        for way, values in report.items():
            told = (f"{name} {value:{',' if isinstance(value, int) else '.5g'}}" for name, value in values.items())
            print(f"{way + ':':16}" + ", ".join(told))


def entry_point() -> None:
    """Run the command line, then exit with its exit code."""
    gc.set_threshold(1_000_000)  # each collection walks what JAX keeps alive: with Python's 700, 1/7 of the startup
    atexit.register(gc.freeze)  # or Python would walk it again on exit: up to a fifth of a short command's time
    if os.getpid() == 1:  # a container's first process gets no signal from Linux that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main())
