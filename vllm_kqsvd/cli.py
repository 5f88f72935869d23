# SPDX-License-Identifier: Apache-2.0
"""The `kqsvd` command. Each verb's module is imported only when the verb is used.

Exit codes: 0 done, 1 refused or failed (one line on stderr), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_kqsvd import __version__
from vllm_kqsvd.errors import KQSVDError

# verb -> (module with add_arguments(parser) and run(args) -> int, help)
VERBS = {
    "calibrate": ("vllm_kqsvd.calibration.cli", "make a projection for a model from sample text"),
    "cut": ("vllm_kqsvd.calibration.cut", "make a projection of fewer bits from a projection alone"),
    "inspect": ("vllm_kqsvd.inspect_projection", "show what a projection holds"),
    "verify": ("vllm_kqsvd.verify", "measure KL and perplexity of a projection on text"),
    "plan": ("vllm_kqsvd.plan_capacity", "tell how many tokens and users fit in a GPU's memory"),
    "doctor": ("vllm_kqsvd.doctor", "check the installation, the projection and the model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kqsvd`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Torch reads this at its first allocation. On CPUs each window of text otherwise takes 10^5 page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        parser = make_parser(next((a for a in argv if not a.startswith("-")), None))
        args = parser.parse_args(argv)
        status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except SystemExit as e:  # argparse: 0 after --help and --version, 2 for wrong arguments
        return e.code if isinstance(e.code, int) else 1
    except KQSVDError as e:
        print(f"kqsvd: error: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        print("kqsvd: interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def make_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only `verb` gets its arguments."""
    parser = argparse.ArgumentParser("kqsvd", description="Latent, mixed-bit KV cache for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm_kqsvd {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (module_name, summary) in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == verb:
            module = _import(name, module_name)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def _import(verb: str, module: str):  # type: ignore[no-untyped-def]
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        missing = e.name or ""
        if missing == module:
            raise KQSVDError(f"`kqsvd {verb}` is not part of this installation ({module} is missing)") from e
        raise KQSVDError(f"`kqsvd {verb}` needs the Python package {missing!r}; pip install {missing}") from e


if __name__ == "__main__":
    sys.exit(main())
