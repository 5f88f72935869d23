# SPDX-License-Identifier: Apache-2.0
"""Markdown tables from the result CSVs, each with where its figures come from."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PROVENANCE = ("date", "device", "versions", "torch", "vllm", "command")
UNKNOWN = "not recorded"  # the command of rows older than that column
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Rows of results/NAME.csv in file order; none if the file is not there."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def newest(rows: list[Row], keys: Iterable[str]) -> list[Row]:
    """The last row of every combination of `keys`, in order of first appearance; one with a command before others."""
    keys, out = tuple(keys), {}
    for row in rows:
        key = tuple(row.get(k, "") for k in keys)
        if key not in out or recorded(row) or not recorded(out[key]):
            out[key] = row
    return list(out.values())


def recorded(row: Row) -> bool:
    """Whether the row says which command made it."""
    return row.get("command", "") != UNKNOWN


def versions(row: Row) -> str:
    """Versions of a row, whichever columns hold them."""
    parts = [f"{k} {row[k]}" for k in ("torch", "vllm") if row.get(k)]
    return re.sub(r"; projection \w+", "", row.get("versions") or ", ".join(parts))


def provenance(rows: list[Row], command: str = "") -> str:
    """Hardware, versions, dates and commands of the rows that are shown, as one line in italics."""

    def distinct(values: Iterable[str]) -> list[str]:
        return sorted({v for v in values if v})

    commands = distinct(row.get("command", "") for row in rows if recorded(row)) or [command]
    more = f" and {len(commands) - 2} more like it" if len(commands) > 2 else ""
    shown = ", ".join(f"`{shorten(c)}`" for c in commands[:2]) + more
    old = sum(not recorded(row) for row in rows)
    shown += f"; {old} of {len(rows)} figures are older, their exact command was not recorded" if old else ""
    dates = distinct(row.get("date", "") for row in rows)
    when = dates[0] if len(dates) < 2 else f"{dates[0]} to {dates[-1]}"
    what = "; ".join(distinct(versions(row).replace(";", ",") for row in rows))
    return f"*{', '.join(distinct(row.get('device', '') for row in rows))}; {what}; {when}; {shown}*"


def shorten(command: str, most: int = 160) -> str:
    """A long command without its tail (the CSV has all of it)."""
    return command if len(command) <= most else command[: most - 2].rsplit(" ", 1)[0] + " ..."


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right."""
    if not rows:
        return "No rows yet."
    right = [all(_numeric(r[i]) for r in rows) for i in range(len(head))]
    rule = "| " + " | ".join("---:" if x else "---" for x in right) + " |"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(r) + " |" for r in rows)])


def _numeric(text: str) -> bool:
    return not text or text.lstrip("*")[:1].isdigit()


def number(text: str, digits: int = 0) -> str:
    """A figure with thousands separators, empty where there is none."""
    return f"{float(text):,.{digits}f}" if text else ""


def pivot(
    rows: list[Row], down: list[str], across: str, value: str, order: list[str]
) -> tuple[list[str], list[list[str]]]:
    """(head, rows) with one column per value of `across` that occurs, in the given order."""
    names = [n for n in order if any(r[across] == n for r in rows)]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[k] for k in down), {})[row[across]] = row[value]
    return [*down, *names], [[*key, *(found.get(n, "") for n in names)] for key, found in lines.items()]
