"""``benchmarks/host_memory.py``: what a process holds of weights in fp32 and in bf16, at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="read from Linux's /proc")

SMALL = [
    "--processes",
    "1",
    "--layers",
    "2",
    "--width",
    "512",
    "--ffn",
    "1024",
    "--vocabulary",
    "8000",
    "--shard",
    "10MB",
]


@pytest.fixture
def host_memory(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath / "benchmarks"))
    import host_memory

    return host_memory


def test_bf16_weights_are_no_memory_of_a_process(host_memory, capsys, tmp_path):
    assert host_memory.main([*SMALL, "--folder", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = {(case["road"], case["dtype"], case["when"]): case for case in json.loads(last)}
    assert len(found) == len(lines) - 4 == 8
    weights = 4 * found["parts", "fp32", "read"]["parameters"]
    for road in ("parts", "stage"):
        for when in ("loaded", "read"):
            assert 0.9 * weights < found[road, "fp32", when]["Private_Dirty"] < 1.3 * weights
            # The tower and the connector are made in fp32; of the decoder nothing is written.
            assert found[road, "bf16", when]["Private_Dirty"] < 0.1 * weights
        assert found[road, "bf16", "loaded"]["peak"] < 0.15 * weights
    assert not list(tmp_path.iterdir())
