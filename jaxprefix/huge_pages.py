"""Huge pages behind a host's large arrays.

An update on a CPU takes some hundred MB for its temporaries and gives them back, every time: a page fault for every
4 KiB of them. glibc's malloc asks for huge pages (madvise, transparent huge pages) if a tunable says so; it reads its
tunables when a process starts, and never again.
"""

import os
import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose processes use huge pages, unless it says already whether they should."""
    tunables = environment.get(TUNABLES, "")
    chosen = HUGE_PAGES in tunables
    return {**environment, TUNABLES: tunables if chosen else ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))}


def start_again_with_huge_pages() -> None:
    """Replace this process by its own command in that environment; call it before anything is done."""
    environment = with_huge_pages(os.environ)
    if sys.platform == "linux" and environment != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
