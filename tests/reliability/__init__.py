# SPDX-License-Identifier: Apache-2.0
"""What breaks in the field, broken on purpose: damaged files, kills, full disks, crowds of requests.

`make test` runs a short version of everything, `make reliability` the long one.
"""

from __future__ import annotations

import os

LONG = os.environ.get("KQSVD_RELIABILITY") == "long"


def sized(short: int, long: int) -> int:
    """A number of cases: `short` in `make test`, `long` in `make reliability`."""
    return long if LONG else short
