# SPDX-License-Identifier: Apache-2.0
"""The calibrator: from a model and some text to a projection folder (installed as `vllm_kqsvd.calibration`)."""

from __future__ import annotations
