"""The rules of docs/architecture.md that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_NOT_IMPORT = {
    "jaxprefix": {"torch", "torch_ref", "transformers", "peft", "deepspeed"},
    "torch_ref": {"jax", "flax", "optax", "jaxprefix"},
    "convert": {"jax", "flax", "jaxprefix", "torch_ref"},
}
ROOMS = ["cli", "train", "update", "generate", "evaluate", "prefix", "models", "data", "tokenizer", "config"]


def imported(path: Path) -> set[str]:
    """All modules a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_packages_keep_apart(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & MAY_NOT_IMPORT[package], path


def test_no_arrow_runs_back_up():
    """A room imports only rooms that stand after it in ROOMS."""
    for index, room in enumerate(ROOMS):
        files = [ROOT / "jaxprefix" / f"{room}.py", *(ROOT / "jaxprefix" / room).rglob("*.py")]
        above = {f"jaxprefix.{name}" for name in ROOMS[:index]}
        for path in filter(Path.is_file, files):
            assert not imported(path) & above, path


def test_torch_is_imported_only_inside_functions_of_convert():
    for path in (ROOT / "convert").rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "torch" not in {alias.name for node in top for alias in node.names}, path


def test_jaxprefix_runs_without_torch():
    script = "import sys; sys.modules['torch'] = None; import jaxprefix, jaxprefix.train, jaxprefix.cli"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_data_needs_no_jax():
    assert not {name for name in imported(ROOT / "jaxprefix" / "data.py") if name.startswith("jax.")}


def test_the_architecture_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for package in MAY_NOT_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            assert path.name == "__init__.py" or re.search(rf"\b{path.name}\b", page), path
