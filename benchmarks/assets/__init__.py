# SPDX-License-Identifier: Apache-2.0
"""Real models and real text for demos, tests and benchmarks, taken from PyPI packages by hash."""
