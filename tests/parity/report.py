"""The parity report: both sides through every stage of every case, one table, docs/parity.md.

python -m tests.parity.report          (make parity)
"""

import dataclasses
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.parity.cases import Case, make_files
from tests.parity.sides import Ours, Theirs
from tests.tolerances import BFLOAT16, BFLOAT16_ROUNDOFF, FUNCTION, LOSS, MODEL, RATE

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- the table below is written by make parity -->\n", "<!-- end of the table -->\n"

CASES = (
    Case("without DeepSpeed"),
    Case("parallel residual, clip 0.05, decay 0.5", parallel_residual=True, grad_clip=0.05, weight_decay=0.5),
    Case("prompts with completions, packed", completions=True, packing=True),
    Case("GPT-2", model_type="gpt"),
    Case("DeepSpeed", deepspeed=True),
    Case(
        "DeepSpeed, accumulation 2, warmup 5, packed", deepspeed=True, packing=True, n_accum_steps=2, n_warmup_steps=5
    ),
    Case("DeepSpeed, bf16", deepspeed=True, bf16=True),
    Case(
        "the demo's base and data, 1,000 updates, packed",
        packing=True,
        trained_base=True,
        n_train=197,  # 49 batches of 4, and 1
        n_dev=38,
        n_training_steps=1000,
    ),
)


def differing(ours: Any, theirs: Any) -> float:
    """Count the items that are not the same: token ids, texts, rows."""
    pairs = itertools.zip_longest(ours, theirs, fillvalue=())
    unequal = sum(not np.array_equal(a, b) for mine, other in pairs for a, b in itertools.zip_longest(mine, other))
    return unequal + abs(len(ours) - len(theirs))  # also if the rows that one side lacks are empty


def absolute(ours: Any, theirs: Any) -> float:
    """The largest difference of two arrays, or of two dicts of arrays."""
    return max(_largest(a - b) for a, b in _arrays(ours, theirs))


def to_largest(ours: Any, theirs: Any) -> float:
    """The largest difference as a share of the largest entry, array by array."""
    return max(_largest(a - b) / _largest(b) for a, b in _arrays(ours, theirs))


def relative(ours: Any, theirs: Any) -> float:
    """The largest relative difference, number by number."""
    return max(_largest((a - b) / b) for a, b in _arrays(ours, theirs))


def straying(ours: Any, theirs: Any, exact: Any) -> float:
    """How far ours is from the float32 reference, as a multiple of how far theirs is: for half precision.

    Distances are norms over all numbers together. One rounding of bfloat16 is added to theirs, which may be near 0 by
    chance.
    """
    ours, theirs, exact = (
        np.concatenate([part.ravel() for part in _arrays_of(side)]) for side in (ours, theirs, exact)
    )
    theirs_strays = np.linalg.norm(theirs - exact) + BFLOAT16_ROUNDOFF * np.linalg.norm(exact)
    return float(np.linalg.norm(ours - exact) / theirs_strays)


def _arrays(ours: Any, theirs: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pair the arrays of both sides; two shapes are infinitely far apart."""
    pairs = zip(_arrays_of(ours), _arrays_of(theirs), strict=True)
    yield from ((a, b) if a.shape == b.shape else (np.array([np.inf]), np.ones(1)) for a, b in pairs)


def _arrays_of(side: Any) -> list[np.ndarray]:
    """The arrays of a dict by name; anything else is one array."""
    parts = [side[name] for name in sorted(side)] if isinstance(side, Mapping) else [side]
    return [np.asarray(part, np.float64) for part in parts]


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())


@dataclasses.dataclass(frozen=True)
class Stage:
    """A quantity that both sides have, how it is compared, and how far apart it may be."""

    title: str
    name: str
    measure: Callable[[Any, Any], float]
    tolerance: float


STAGES = (
    Stage("tokens (differing)", "tokens", differing, 0),
    Stage("chunks (differing)", "chunks", differing, 0),
    Stage("batches (differing arrays)", "batches", differing, 0),
    Stage("base keys and values", "base_keys_values", absolute, MODEL),
    Stage("encoder after 200 fitting steps", "initialised", absolute, FUNCTION),
    Stage("logits with prefix", "logits", absolute, MODEL),
    Stage("loss (relative)", "loss", relative, LOSS),
    Stage("encoder gradients (to the largest entry)", "gradients", to_largest, MODEL),
    Stage("clipped gradients (to the largest entry)", "clipped_gradients", to_largest, MODEL),
    Stage("learning rate of each update (to the largest)", "learning_rates", to_largest, RATE),
    Stage("loss of each update (relative)", "losses", relative, LOSS),
    Stage("folded weight after the last update", "folded", absolute, MODEL),
    Stage("dev loss of each epoch (relative)", "dev_losses", relative, LOSS),
    Stage("dev ppl of each epoch (relative)", "dev_ppls", relative, MODEL),
    Stage("saved file, read by the other side", "saved", absolute, MODEL),
    Stage("greedy ids (differing)", "greedy_ids", differing, 0),
    Stage("nucleus probabilities", "nucleus_probabilities", absolute, FUNCTION),
)
# In bfloat16 two texts may part at a near tie, and the nucleus does not depend on the model.
NOT_IN_BFLOAT16 = {"greedy_ids", "nucleus_probabilities"}
EXACT_IN_BFLOAT16 = {"tokens", "chunks", "batches", "learning_rates"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one stage of one case showed."""

    case: Case
    stage: Stage
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


def compare(case: Case, ours: Ours, theirs: Theirs, exact: Theirs | None = None) -> Iterator[Result]:
    """Yield the result of every stage, computing no further than is asked for; `exact` is theirs in float32."""
    for stage in STAGES:
        if exact and stage.name in NOT_IN_BFLOAT16:
            continue
        sides = [getattr(side, stage.name) for side in (ours, theirs)]
        if exact and stage.name not in EXACT_IN_BFLOAT16:
            yield Result(case, stage, straying(*sides, getattr(exact, stage.name)), BFLOAT16)
        else:
            yield Result(case, stage, stage.measure(*sides), stage.tolerance)


def compare_case(case: Case, folder: Path) -> Iterator[Result]:
    """Make both sides of a case, with their files in a folder, and compare them."""
    base, data = make_files(case, folder)
    ours = Ours(case, base, data, folder / "ours")
    theirs = Theirs(case, base, data, folder / "theirs", ours.raw_encoder)
    exact = None
    if case.bf16:
        exact = Theirs(dataclasses.replace(case, bf16=False), base, data, folder / "exact", ours.raw_encoder)
    yield from compare(case, ours, theirs, exact)


def table(results: list[Result]) -> str:
    """All results as one Markdown table: a row for each stage, a column for each case."""
    cases = list(dict.fromkeys(result.case for result in results))
    lines = ["| stage | tolerance | " + " | ".join(case.name for case in cases) + " |"]
    lines.append("| --- |" + " ---: |" * (len(cases) + 1))
    for stage in STAGES:
        found = {result.case: result for result in results if result.stage is stage}
        cells = [_cell(found[case]) if case in found else "–" for case in cases]
        lines.append(f"| {stage.title} | {stage.tolerance:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(result: Result) -> str:
    text = f"{result.difference:.1e}" if result.tolerance else f"{result.difference:g}"
    if result.tolerance == BFLOAT16:
        text = f"{result.difference:.2f} ×"
    return text if result.holds else f"**{text} FAILS**"


def write_page(results: list[Result]) -> None:
    """Replace the table in docs/parity.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Compare every case, print the table and write the page; return 1 if a stage failed."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor does PyTorch compute on a GPU
    results = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for result in compare_case(case, Path(folder)):
                verdict = "holds" if result.holds else "FAILS"
                figures = f"{result.difference:.2e}  (tolerance {result.tolerance:g})"
                print(f"{case.name:36} {result.stage.title:46} {figures:34} {verdict}", flush=True)
                results.append(result)
    write_page(results)
    print("\n" + table(results))
    failed = [result for result in results if not result.holds]
    n_stages = len(results)
    print(
        f"{n_stages - len(failed)} of {n_stages} comparisons hold; largest share of a tolerance used: "
        f"{max((r.difference / r.tolerance for r in results if r.tolerance), default=math.nan):.2g}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
