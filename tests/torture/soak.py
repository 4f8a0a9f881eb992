"""Generate for long and at the same time: the outputs stay what they were, the memory stays what it was.

python -m tests.torture.soak --n_processes 10 --n_generations 2000 --seed 0
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import tyro

import jaxprefix
from jaxprefix.decode import PROMPT_STEP
from jaxprefix.machine.compiling import prepare_compiling
from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.memory import memory
from tests.runs import run_config, start

N_BEFORE = 100
"""Generations after which memory must not grow: all shapes have been compiled."""
MOST_GROWTH = 0.05
N_REQUESTS = 300
BATCHES = ((1, 16), (3, 16), (16, 4), (16, 16))
"""Number of prompts and batch size."""
WIDTHS = (1, 2, 3)
"""Lengths of the longest prompt, in buckets."""
DECODING: list[dict[str, Any]] = [
    {"decode_method": "greedy"},
    {"decode_method": "sample", "temperature": 0.8},
    {"decode_method": "nucleus", "top_p": 0.9, "top_k": 20},
]


class Request(NamedTuple):
    """Arguments of `generate`."""

    prompts: list[str]
    seed: int
    batch_size: int
    decoding: dict[str, Any]


def make_requests(tokenizer: Any, dice: random.Random) -> list[Request]:
    """Make requests of every batch, width and decoding method, in turn, with texts of random lengths."""
    documents = [json.loads(line)["text"] for line in (GOLDEN / "documents.jsonl").read_text().splitlines()]
    ids = tokenizer.encode("".join(documents))

    def text(n_tokens: int) -> str:
        first = dice.randrange(len(ids) - n_tokens)
        return tokenizer.decode(ids[first : first + n_tokens])

    kinds = [(*batch, width, decoding) for batch in BATCHES for width in WIDTHS for decoding in DECODING]
    requests = []
    for number in range(N_REQUESTS):
        n_prompts, batch_size, width, decoding = kinds[number % len(kinds)]
        longest = PROMPT_STEP * width
        prompts = [text(dice.randint(1, longest - 2)) for _ in range(n_prompts)]
        prompts[0] = text(dice.randint(longest - 8, longest - 2))
        requests.append(Request(prompts, dice.randrange(1000), batch_size, decoding))
    return requests


def soak(run_dir: Path, n_generations: int, dice: random.Random) -> None:
    """Generate in this process, compare each output with the first one of its request, and watch the memory."""
    prepare_compiling()
    model, tokenizer = jaxprefix.load_model(GOLDEN_BASE), jaxprefix.load_tokenizer(GOLDEN_BASE)
    prefix = jaxprefix.load_prefix(run_dir, model.config)
    requests = make_requests(tokenizer, dice)
    first_outputs: dict[int, list[str]] = {}
    early = most = 0
    for number in range(n_generations):
        index = number if number < N_BEFORE else dice.randrange(N_REQUESTS)
        prompts, seed, batch_size, decoding = requests[index]
        made = jaxprefix.generate(
            model, tokenizer, prompts, prefix=prefix, seed=seed, batch_size=batch_size, max_output_len=16, **decoding
        )
        assert made == first_outputs.setdefault(index, made), f"generation {number}: another output than before"
        if number + 1 == N_BEFORE:
            early = memory("VmRSS")
        elif number + 1 > N_BEFORE:
            most = max(most, memory("VmRSS"))
    growth = most / early - 1
    print(
        f"{n_generations} generations of {len(first_outputs)} requests: outputs unchanged; memory {early / 1e6:.0f} MB "
        f"after {N_BEFORE}, never more than {most / 1e6:.0f} MB ({100 * growth:+.1f} %) from then on"
    )
    assert growth <= MOST_GROWTH, "memory grows"


def crowd(run_dir: Path, n_processes: int) -> None:
    """Let one process generate, then many at once, and compare what they print."""
    prompts = [json.loads(line)["text"][:12] for line in (GOLDEN / "documents.jsonl").read_text().splitlines()]
    command = [sys.executable, "-m", "jaxprefix", "generate", "--pretrained_model_dir", str(GOLDEN_BASE), "--json"]
    command += ["--prefix_checkpoint_path", str(run_dir), "--decode_method", "greedy", "--prompt", *prompts]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def output(process: subprocess.Popen[str]) -> str:
        text, errors = process.communicate()
        assert process.returncode == 0, errors
        return text

    alone = output(begin())
    assert len(alone.splitlines()) == len(prompts)
    together = [output(process) for process in [begin() for _ in range(n_processes)]]
    assert together == [alone] * n_processes
    print(f"{n_processes} processes at once over one prefix: the output of one alone, {len(prompts)} prompts each")


def main(n_processes: int = 10, n_generations: int = 2000, seed: int = 0) -> None:
    """Train a small prefix, then generate with it."""
    folder = Path(tempfile.mkdtemp(prefix="jaxprefix-soak-"))
    config = run_config(folder)
    process = start(config)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    crowd(config.run_dir, n_processes)
    soak(config.run_dir, n_generations, random.Random(seed))
    shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
