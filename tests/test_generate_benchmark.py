"""The benchmark of answers, end to end with a tiny decoder: what it compares and prints, not how long it took."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from PIL import Image

from skipvision_train.inference import Conversation

TINY = ["--geometry", "small", "--layers", "2", "--width", "128", "--visual", "16", "--device", "cpu", "--warmup", "0"]


@pytest.fixture
def bench(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import generate

    return generate


def test_it_prints_a_table_per_setting_and_ends_with_json(bench, capsys, tmp_path):
    file = tmp_path / "results.json"
    options = ["--batch", "1", "2", "--new", "3", "5", "--repeats", "2", "--json", str(file)]
    bench.main([*TINY, *options])
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert json.loads(file.read_text())["results"] == results
    names = [bench.STOCK, bench.AGAIN, *bench.CASES]
    settings = [(1, 3), (1, 5), (2, 3), (2, 5)]
    assert [(r["batch"], r["new"], r["case"]) for r in results] == [(*s, name) for s in settings for name in names]
    assert [sum(line.startswith(f"| {name} |") for line in lines) for name in names] == [4] * len(names)
    rows = {(r["batch"], r["new"], r["case"]): r for r in results}
    for (batch, new, case), row in rows.items():
        assert row["refused"] is None
        assert row["tokens_per_second"] == pytest.approx(1000 * batch * new / row["ms"])
        assert (row["speed"] == 1) == (case == bench.STOCK)
    args = bench.parse_options(TINY)
    llava = bench.make_assistants(bench.decoder_config(args), 16, args)["llava"]
    asked = Conversation().ask(bench.QUESTION, [Image.new("RGB", (56, 56))])
    prompt = llava.encode([asked])["input_ids"].shape[1]
    # Two layers, keys and values of 128 numbers of 4 bytes; all of LLaVA's 16 visual tokens leave the cache.
    leaving = dict(zip(bench.CASES, (0, 0, 16, 16 - 16 * 100 // 576), strict=True))
    for (batch, new, case), row in rows.items():
        if case in leaving:
            assert row["cache_bytes"] == batch * 2 * 2 * 128 * 4 * room(prompt - leaving[case], new - 1)


def room(held, steps):
    """Positions of a cache: exact after the prompt; when it is full, it takes a sixteenth more than it needs."""
    found = held
    for _ in range(steps):
        held += 1
        found = found if held <= found else held + held // 16
    return found


def test_all_models_have_the_same_decoder_and_see_the_same_prompt(bench):
    args = bench.parse_options(TINY)
    found = bench.make_assistants(bench.decoder_config(args), 16, args)
    ids, image = torch.arange(5)[None], Image.new("RGB", (56, 56))
    llava, *ours = (found[name] for name in ("llava", "ours", "ours, skipping"))
    prompt = llava.encode([Conversation().ask(bench.QUESTION, [image])])["input_ids"]
    assert (prompt == llava.model.config.image_token_id).sum() == 16
    with torch.no_grad():
        logits = llava.model.lm_head(llava.model.model.language_model(input_ids=ids).last_hidden_state)
        for assistant in ours:
            assert torch.equal(assistant.encode([Conversation().ask(bench.QUESTION, [image])])["input_ids"], prompt)
            assert torch.equal(assistant.model.language_model(input_ids=ids).logits, logits)


def test_options_that_cannot_be(bench, capsys):
    for options, message in ((["--visual", "15"], "a square number"), (["--new", "1"], "at least 2")):
        with pytest.raises(SystemExit):
            bench.main([*TINY, *options])
        assert message in capsys.readouterr().err
