# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard: Grafana's own model reads all of it, its queries are PromQL, its panels do not overlap.

That every query finds metrics of a real server is tests/attention/test_serve.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BOARD = json.loads((Path(__file__).parents[1] / "dashboards" / "kqsvd.json").read_text())
EXPORT_ONLY = {"__inputs", "__requires", "definition"}  # what Grafana's export adds, and its import reads


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """Paths of what a reader dropped or changed."""
    if isinstance(given, dict) and isinstance(kept, dict):
        missing = [f"{where}/{k}" for k in given if k not in kept and k not in EXPORT_ONLY]
        return missing + [x for k in given if k in kept for x in lost(given[k], kept[k], f"{where}/{k}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [x for i, pair in enumerate(zip(given, kept, strict=True)) for x in lost(*pair, f"{where}[{i}]")]
    return [] if given == kept else [where]


def test_grafanas_model_reads_every_field() -> None:
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    assert lost(BOARD, json.loads(JSONEncoder().encode(Dashboard.from_json(BOARD)))) == []


def test_queries_are_promql() -> None:
    promql = pytest.importorskip("promql_parser")
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            promql.parse(target["expr"].replace("$__rate_interval", "1m"))


def test_panels_lie_beside_each_other_and_use_the_chosen_source() -> None:
    assert len({p["id"] for p in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells
    sources = [p["datasource"] for p in BOARD["panels"]] + [
        t["datasource"] for p in BOARD["panels"] for t in p["targets"]
    ]
    assert all(s == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for s in sources)
    assert [i["name"] for i in BOARD["__inputs"]] == ["DS_PROMETHEUS"]
