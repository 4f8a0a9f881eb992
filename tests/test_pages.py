"""The commands on our pages are ones that the command line takes, and their links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from jaxprefix.cli import Command

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
}
IN_A_JOB = {
    "$NODE0:$((20000 + SLURM_JOB_ID % 40000))": "node0:20000",
    "$SLURM_NTASKS": "2",
    "$SLURM_PROCID": "1",
    "$(test -f runs/smile/config.json && echo --resume)": "--resume",
}


def shell_blocks(page: str) -> list[str]:
    """The blocks of commands on a page."""
    return re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The arguments of every `jaxprefix` line in a page's shell blocks; not of those that leave some out (…)."""
    lines = "".join(shell_blocks(page)).replace("\\\n", " ").splitlines()
    found = [re.search(r"\bjaxprefix ((train|generate|evaluate|convert|check) .*)", line) for line in lines]
    texts = [match[1].rstrip("'") for match in found if match and "…" not in match[1]]
    for written, meant in IN_A_JOB.items():
        texts = [text.replace(written, meant) for text in texts]
    return [shlex.split(text, comments=True) for text in texts]


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_are_taken(page):
    for arguments in commands(PAGES[page]):
        tyro.cli(Command, prog="jaxprefix", args=arguments, use_underscores=True)


def test_commands_are_found():
    counts = {page: len(commands(text)) for page, text in PAGES.items()}
    assert {page: n for page, n in counts.items() if n} == {
        "README.ja.md": 5,
        "README.md": 8,
        "docs/formats.md": 4,
        "docs/launch.md": 7,
    }


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_can_be_pasted(page):
    """Into zsh, too, where # begins no comment."""
    for block in shell_blocks(PAGES[page]):
        if not block.startswith("#!"):
            assert not re.search(r"(^|\s)#", block, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("minor", [9, 10, 15])
def test_make_refuses_a_wrong_python_before_it_makes_an_environment_of_it(tmp_path, minor):
    """That environment would stay one of the wrong Python, whatever the next make is given."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (wrong := tmp_path / f"python3.{minor}").write_text(
        f"""#!/bin/sh
exec {sys.executable} -c 'import sys; sys.version_info = (3, {minor}, 1); exec(sys.argv[1])' "$2"
"""
    )
    wrong.chmod(0o755)
    command = ["make", "demo", f"PYTHON={wrong}"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode != 0
    assert "needs Python 3.11 to 3.14" in made.stderr
    assert not (tmp_path / ".venv").exists()
