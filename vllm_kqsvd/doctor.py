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
    failed = [c.name for c in checks if c.status == "fail"]
    command = serve_command(args.model, args.projection)
    if args.json:
        data = {"ok": not failed, "checks": [asdict(c) for c in checks], "serve_command": command}
        print(json.dumps(data, indent=2))
    else:
        print(as_text(checks, failed, command))
    return int(bool(failed))


def as_text(checks: list[Check], failed: list[str], command: str) -> str:
    """One line per check, the verdict, the command."""
    width = max(len(c.name) for c in checks)
    lines = [f"{c.status.upper():4}  {c.name.ljust(width)}  {c.detail}" for c in checks]
    verdict = f"not ready: {', '.join(failed)}" if failed else "ready"
    return "\n".join([*lines, "", verdict, "serve with:", f"  {command}"])


def serve_command(model: str | None, projection: str | None) -> str:
    """The line that serves `model` with `projection`; placeholders where they are not known."""
    words = ["vllm", "serve", model or "MODEL", "--attention-backend", "CUSTOM"]
    if projection or not model or not beside(model).is_dir():
        options = {"kqsvd": {"projection": projection or "DIR"}}
        words += ["--additional-config", json.dumps(options)]
    return private(shlex.join(words))
