"""The loader's benchmark, end to end on a few small photos: what it prints, not how long it took."""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def loader(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import loader
    import loader_cases

    monkeypatch.setattr(loader_cases, "SCENE", 704)  # large ones take seconds
    return loader


SMALL = ["--images", "3", "--sizes", "700x300", "90x120", "--repeats", "1", "--warmup", "0", "--length", "1024"]


def test_the_loader_prints_tables_and_ends_with_json(loader, capsys, tmp_path):
    file = tmp_path / "results.json"
    loader.main([*SMALL, "--settings", "336", "hd", "--samples", "40", "--json", str(file)])
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    written = json.loads(file.read_text())
    assert written["results"] == results
    assert all(f"{name}: {value}" in lines for name, value in written["header"].items())
    names = [case.name for case in loader.cases("336")]
    assert [row["case"] for row in results[: 2 * len(names)]] == names * 2
    for row in results[: 2 * len(names)]:
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
        assert (row["speed"] == 1) == (row["case"] == loader.BASE)
        line = next(line for line in lines if line.startswith(f"| {row['case']} |"))
        assert line.count("|") == 9
    assert names == [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")][1 : 1 + len(names)]


@pytest.mark.parametrize("setting", ["336", "hd"])
def test_all_ways_make_the_same_pixels(loader, tmp_path, setting):
    """The comparison would be worth nothing with another padding, another order of tiles or another filter."""
    files = loader.write_photos(tmp_path, 4, [(700, 300), (90, 120), (340, 700), (336, 336)], 90)
    lines = {case.name: case for case in loader.cases(setting)}
    for name in ("CLIPImageProcessor", "CLIPImageProcessorPil", "torchvision", "ours, resizer pillow"):
        found = loader.compared(lines[name], lines[loader.OURS], setting, files)
        assert found["mean_levels"] < 0.1
        assert found["max_levels"] < 2.01
    # A JPEG is decoded smaller only where it has the pixels to spare: here 700 x 300 for 336.
    smaller = loader.compared(lines["ours, JPEG draft"], lines[loader.OURS], setting, files)
    assert (smaller["mean_levels"] > 0.1) == (setting == "336")


def test_photos_are_whole_and_differ(loader, tmp_path):
    files = loader.write_photos(tmp_path, 5, [(64, 48), (48, 64)], 90)
    images = [Image.open(file) for file in files]
    assert [image.size for image in images] == [(64, 48), (48, 64)] * 2 + [(64, 48)]
    assert {image.format for image in images} == {"JPEG"}
    assert len({image.tobytes() for image in images}) == 5
    assert all(np.asarray(image).std() > 10 for image in images)


def test_tokens_alone(loader, capsys):
    loader.main([*SMALL, "--settings", "--samples", "200"])
    encoded, padded, packed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert encoded["filled"] is None
    assert padded["filled"] < packed["filled"] <= 1
    assert packed["filled"] > 0.9
    assert all(row["tokens_per_second"] > 0 for row in (encoded, padded, packed))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--sizes", "640"], "'640'; use WIDTHxHEIGHT, up to 2048x2048"),
        (["--sizes", "640x0"], "'640x0'; use WIDTHxHEIGHT"),
        (["--sizes", "64x2049"], "'64x2049'; use WIDTHxHEIGHT"),
        (["--images", "0"], "--images 0: at least 1 is needed"),
        (["--repeats", "0"], "--repeats 0: at least 1 is needed"),
        (["--settings", "224"], "invalid choice: '224'"),
    ],
)
def test_options_that_cannot_be_are_refused(loader, capsys, options, complaint):
    with pytest.raises(SystemExit):
        loader.parse(options)
    assert complaint in capsys.readouterr().err
