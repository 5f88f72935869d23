# SPDX-License-Identifier: Apache-2.0
"""Memory that a pass frees stays with the process, instead of going back to the system page by page.

Activations of a window are a few MB each and come and go hundreds of times. glibc takes such blocks from the system
anew each time, and every first touch of a page is a fault: 90,000 of them per window of SmolLM2-135M, 4 % of its time.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGE = 64 << 20  # blocks from here on are still given back


def keep_freed_memory() -> bool:
    """Set this process's malloc so; False where it is not glibc's. For commands, not inside others' processes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena: those of threads are cut into pieces of 64 MB and give back what lies on top.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return sum(mallopt(which, value) for which, value in settings) == len(settings)
