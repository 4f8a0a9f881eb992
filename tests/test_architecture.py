"""The rules of docs/architecture.md that a machine can check."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from jaxprefix.sampling import are_finite
from tests.base_folders import GOLDEN, GOLDEN_BASE

ROOT = Path(__file__).parent.parent
MAY_NOT_IMPORT = {
    "jaxprefix": {"torch", "torch_ref", "transformers", "peft", "deepspeed"},
    "torch_ref": {"jax", "flax", "optax", "jaxprefix"},
    "convert": {"jax", "flax", "jaxprefix", "torch_ref"},
}
# A room imports only rooms of its own floor or of floors below it.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"train", "conversion", "check", "generation", "evaluation"},
    {"loop"},
    {"inputs", "inference", "run.faults", "start"},
    {"update", "decode", "metrics", "run.folder"},
    {"prefix", "sampling", "loss", "sharding", "run.checkpoint", "run.lock"},
    {"run.description", "run.log", "run.orbax_errors"},
    {"base_folder"},
    {"models"},
    {"data.batches"},
    {"data.shapes"},
    {"data.plan", "data.rows"},
    {"data.token_cache"},
    {"data.examples"},
    {"data.lines"},
    {"tokenizer"},
    {"vocabularies"},
    {"inference_config", "machine.joining"},
    {"config", "hub", "machine.compiling", "machine.hosts"},
    {"recipe", "machine.devices", "machine.memory", "machine.user_cache"},
    {"settings", "sentences", "machine.screen"},
]


def imported(path: Path, body: list[ast.stmt] | None = None) -> set[str]:
    """All modules that a file, or a part of it, imports, as dotted names."""
    names = set()
    for node in itertools.chain.from_iterable(map(ast.walk, body or [ast.parse(path.read_text())])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top_packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_packages_keep_apart(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not top_packages(imported(path)) & MAY_NOT_IMPORT[package], path


def room_of(path: Path) -> str:
    """The room that a file of jaxprefix belongs to: the file itself, or all models."""
    parts = path.relative_to(ROOT / "jaxprefix").with_suffix("").parts
    return "models" if parts[0] == "models" else ".".join(parts)


FILES = [path for path in (ROOT / "jaxprefix").rglob("*.py") if not room_of(path).endswith("__init__")]


def test_every_room_has_its_floor():
    assert {room_of(path) for path in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_no_arrow_runs_back_up(path):
    own = next(index for index, floor in enumerate(FLOORS) if room_of(path) in floor)
    above = tuple(f"jaxprefix.{room}." for floor in FLOORS[:own] for room in floor)
    assert not [name for name in imported(path) if f"{name}.".startswith(above)]


def test_torch_is_imported_only_inside_functions_of_convert():
    for path in (ROOT / "convert").rglob("*.py"):
        statements = [n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert "torch" not in top_packages(imported(path, statements)), path


def test_jaxprefix_runs_without_torch():
    """It reads the original's files."""
    program = """import sys; sys.modules["torch"] = None
import jaxprefix, jaxprefix.cli, jaxprefix.train
model = jaxprefix.load_model(sys.argv[1])
prefix = jaxprefix.load_prefix(sys.argv[2], model.config)
jaxprefix.generate(model, jaxprefix.load_tokenizer(sys.argv[1]), ["a"], prefix, max_output_len=1)"""
    subprocess.run([sys.executable, "-c", program, GOLDEN_BASE, GOLDEN / "forward.weight"], check=True)


def test_tests_check_what_signatures_promise():
    with pytest.raises(jaxtyping.TypeCheckError):
        are_finite(jnp.zeros(3))  # logits have two axes


def test_public_names_are_listed_before_they_are_imported():
    script = "import sys, jaxprefix as j; assert {*j.__all__} <= {*dir(j)} and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_orbax_is_imported_when_a_checkpoint_needs_it():
    script = "import sys, jaxprefix.train, jaxprefix.decode; assert 'orbax.checkpoint' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_data_needs_no_jax():
    modules = ", ".join(f"jaxprefix.data.{path.stem}" for path in (ROOT / "jaxprefix" / "data").glob("[!_]*.py"))
    script = f"import sys, {modules}; assert not {{'jax', 'flax', 'optax'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_architecture_page_names_every_file():
    """Each in the part of its package, as deep as it lies."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    for package in MAY_NOT_IMPORT:
        (part,) = re.findall(rf"^{package}/ .*\n((?: .*\n)*)", page, re.MULTILINE)
        for path in (ROOT / package).rglob("*.py"):
            depth = "  " * len(path.parent.relative_to(ROOT).parts)
            named = re.search(rf"^{depth}([\w.]+ )*{path.name} ", part, re.MULTILINE)
            assert path.name == "__init__.py" or named, path
