# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet. One class per cause; each message says what was asked, what was found, what to do."""

from __future__ import annotations


class KQSVDError(Exception):
    """Base of all errors raised on purpose by vllm_kqsvd."""


class ConfigError(KQSVDError):
    """A setting is missing, unknown or contradictory."""


class PlanError(KQSVDError):
    """A bit plan that the page layout cannot hold."""


class ProjectionFileError(KQSVDError):
    """A projection folder that cannot be read, is damaged, or belongs to another model or version."""


class UnsupportedError(KQSVDError):
    """A combination of model, vLLM feature and hardware that is refused at start-up."""


class CalibrationError(KQSVDError):
    """Calibration cannot go on: data, model or output location are unusable."""


class KernelError(KQSVDError):
    """A kernel that was asked for is not available, or its self-test failed."""
