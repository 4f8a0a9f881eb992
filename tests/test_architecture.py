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
# A room, a file or a folder, imports only rooms of its own floor or of floors below it.
FLOORS = {
    "jaxprefix": [
        {"__main__"},
        {"cli"},
        {"train"},
        {"check", "conversion", "loop"},
        {"evaluation", "start"},
        {"generation", "metrics", "update"},
        {"decode", "inference", "loss"},
        {"prefix"},
        {"inputs", "run"},
        {"base_folder", "sharding"},
        {"models"},
        {"data", "sampling"},
        {"inference_config", "machine", "tokenizer"},
        {"config", "hub"},
        {"recipe", "settings", "suffix_rate", "vocabularies"},
    ],
    "jaxprefix/run": [
        {"faults"},
        {"folder"},
        {"checkpoint", "lock"},
        {"description", "log", "orbax_errors", "progress"},
    ],
    "jaxprefix/models": [
        {"__init__"},
        {"gpt2", "gpt_neox"},
        {"stack"},
        {"attention"},
        {"blocked", "packing"},
        {"layers"},
        {"config"},
    ],
    "jaxprefix/data": [
        {"batches", "plan"},
        {"shapes"},
        {"rows"},
        {"token_cache"},
        {"examples"},
        {"lines"},
    ],
    "jaxprefix/machine": [
        {"joining"},
        {"compiling", "hosts"},
        {"devices", "memory", "screen", "user_cache"},
    ],
}


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


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_its_floor(package):
    rooms = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set().union(*FLOORS[package]) - {"__init__"}


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_runs_back_up(package):
    folder, module = ROOT / package, package.replace("/", ".")
    for index, floor in enumerate(FLOORS[package]):
        above = tuple(f"{module}.{room}." for rooms in FLOORS[package][:index] for room in rooms)
        for room in floor:
            for path in [folder / f"{room}.py", *(folder / room).rglob("*.py")]:
                names = imported(path) if path.is_file() else set()
                assert not [name for name in names if f"{name}.".startswith(above)], path


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
