"""``benchmarks/order.py``: orders are the same on 1, 2 and 8 ranks, and it would say so if they were not."""

from __future__ import annotations

import json
from types import ModuleType

import pytest


@pytest.fixture
def order(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import order

    return order


SMALL = ["--files", "8", "--records", "40", "--steps", "4"]


def test_every_loader_takes_the_same_steps_on_1_2_and_8_ranks_and_resumed(order, capsys):
    assert order.main(SMALL) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert [case["loader"].split(",")[0] for case in results] == ["map"] * 3 + ["packed"] * 3 + ["streaming"] * 2
    hashes = [{*case["hash"].values(), case["resumed"]} for case in results]
    assert all(len(found) == 1 for found in hashes)
    assert len(set.union(*hashes)) == 7  # two streams are one
    assert [line.rsplit("|", 2)[1].strip() for line in lines[2:]] == ["yes"] * 8


def test_an_order_that_depends_on_the_ranks_is_found(order, capsys, monkeypatch):
    share, loaders = order.StreamShare, order.loaders
    monkeypatch.setattr(order, "StreamShare", lambda lanes, rank, ranks, *more: share(ranks, rank, ranks, *more))
    monkeypatch.setattr(order, "loaders", lambda *data: [*loaders(*data)][6:7])
    assert order.main(SMALL) == 1
    assert "| NO |" in capsys.readouterr().out
