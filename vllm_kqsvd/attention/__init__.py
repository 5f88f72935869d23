# SPDX-License-Identifier: Apache-2.0
"""The vLLM attention backend; with plugin.py, cpu_dispatch.py and config.py the only code that knows vLLM."""
