"""What a process does with memory that it no longer needs."""

from __future__ import annotations

import ctypes

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>


def keep_freed_memory() -> bool:
    """Keep freed memory for the next allocation, in this process and for good, instead of handing it back to the system.

    A training step frees its gradients and allocates as much again. glibc gives large blocks back, and a page that comes anew costs
    more than what is then written to it: a third of a small step (docs/performance.md). The process stays as large as it ever was,
    so this is for processes that train: the lab's, and yours if you call it or set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_.

    Returns:
        Whether the C library could be told so; only glibc can.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such function, or no C library under that name (Windows)
        return False
    # older versions take no more than 32 MiB for what is mapped on its own
    return bool(tell(_TRIM, (1 << 31) - 1)) and any(tell(_MMAP, size) for size in (1 << 30, 1 << 25))
