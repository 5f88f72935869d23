# SPDX-License-Identifier: Apache-2.0
"""A projection replaced while a server starts: all layers and ranks have one version, or the start is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.attention.conftest import engine, quiet_cpu  # noqa: E402, F401 (fixture)
from tests.attention.models import write_model, write_projection  # noqa: E402
from vllm_kqsvd.attention import binding  # noqa: E402
from vllm_kqsvd.codec import LayerCodec  # noqa: E402
from vllm_kqsvd.errors import ProjectionFileError  # noqa: E402


@dataclass
class Group:
    """A parallel group in which rank 0 has read `theirs`."""

    world_size: int
    theirs: str = ""

    def broadcast_object(self, mine: str, src: int) -> str:
        return self.theirs


def test_layers_of_two_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    write_projection(tmp_path / "p", model, 8)
    bind = binding.shard
    bound = []

    def replace_after_the_first(codec: LayerCodec, num_kv_heads: int, rank: int, world: int, name: str) -> LayerCodec:
        write_projection(tmp_path / "p", model, 4)
        bound.append(name)
        return bind(codec, num_kv_heads, rank, world, name)

    monkeypatch.setattr(binding, "shard", replace_after_the_first)
    with pytest.raises(Exception) as error, engine(model, tmp_path / "p"):
        pass
    assert "the folder was replaced" in str(error.getrepr(style="long"))
    assert len(bound) == 1


def test_ranks_of_two_versions_are_refused() -> None:
    binding.check_same_everywhere("aa", "layer", "aa", (Group(1, "bb"), Group(2, "aa")))  # type: ignore[list-item]
    with pytest.raises(ProjectionFileError, match="found the projection aa, others bb"):
        binding.check_same_everywhere("aa", "layer", "aa", (Group(2, "bb"),))  # type: ignore[list-item]


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    assert binding._state(tmp_path / "nowhere") == (0, 0)
