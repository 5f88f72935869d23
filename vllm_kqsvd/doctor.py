# SPDX-License-Identifier: Apache-2.0
"""`kqsvd doctor`: is everything in place to serve? Text fit for a bug report: no host, user or key names."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict

from vllm_kqsvd.doctor_checks import Check, all_checks, beside, private


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--model", help="local Hugging Face folder of the model to serve")
    parser.add_argument("--projection", help="projection folder; default: `kqsvd` in the model's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = (
        "Exit code 0: ready to serve; 1: something would keep a server from starting (a FAIL line says what)."
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if something would keep a server from starting, else 0."""
    checks = all_checks(args.model, args.projection)
    failed = any(c.status == "fail" for c in checks)
    command, words = serve_command(args.model, args.projection), verdict(checks)
    if args.json:
        data = {"ok": not failed, "verdict": words, "checks": [asdict(c) for c in checks], "serve_command": command}
        print(json.dumps(data, indent=2))
    else:
        width = max(len(c.name) for c in checks)
        lines = [f"{c.status.upper():4}  {c.name.ljust(width)}  {c.detail}" for c in checks]
        print("\n".join([*lines, "", words, "then serve with:" if failed else "serve with:", f"  {command}"]))
    return int(failed)


def verdict(checks: list[Check]) -> str:
    """One line: ready or not, and what is in the way or was not looked at."""
    named = {s: ", ".join(dict.fromkeys(c.name for c in checks if c.status == s)) for s in ("fail", "warn")}
    if named["fail"]:
        return f"not ready: see FAIL above ({named['fail']})"
    but = f"; see WARN above ({named['warn']})" if named["warn"] else ""
    if not any(c.name == "model" and c.status == "ok" for c in checks):
        return f"the installation is ready{but}; no model was checked: give --model and --projection"
    return f"ready{but}"


def serve_command(model: str | None, projection: str | None) -> str:
    """The line that serves `model` with `projection`; placeholders where they are not known."""
    words = ["vllm", "serve", model or "MODEL", "--attention-backend", "CUSTOM"]
    if projection or not model or not beside(model).is_dir():
        options = {"kqsvd": {"projection": projection or "DIR"}}
        words += ["--additional-config", json.dumps(options)]
    return private(shlex.join(words))
