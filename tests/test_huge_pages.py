"""Commands start again in an environment in which malloc asks for huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprefix.huge_pages import TUNABLES, with_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COUNT_FAULTS = """
import ctypes, resource, sys
from jaxprefix.huge_pages import start_again_with_huge_pages
if sys.argv[1] == "start again":
    start_again_with_huge_pages()
n_bytes, libc = 2**26, ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ctypes.memset(libc.malloc(ctypes.c_size_t(n_bytes)), 1, n_bytes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("tunables", "then"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=4", "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_what_the_environment_says_already_stays(tunables, then):
    assert with_huge_pages({TUNABLES: tunables, "HOME": "/"}) == {TUNABLES: then, "HOME": "/"}


@pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="this system has no transparent huge pages"
)
def test_a_large_array_costs_few_page_faults():
    plain = {name: value for name, value in os.environ.items() if name != TUNABLES}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", COUNT_FAULTS, how]
        return int(subprocess.run(command, env=plain, check=True, stdout=subprocess.PIPE).stdout)

    assert faults("start again") < 1000
    if "[madvise]" in SETTING.read_text():
        assert faults("go on") > 2**26 // 4096
