"""``skipvision sketches`` writes what it is told to."""

import dataclasses

from skipvision_train.commands.sketches import Config, run
from skipvision_train.sketches.settings import DataSize, LanguageSize, VisionSize
from skipvision_train.sketches.writer import read_manifest


def test_run_writes_the_sizes_asked_for(tmp_path):
    cfg = Config(
        output=str(tmp_path / "out"),
        data=DataSize(pretrain=3, sft=2, heldout=7, image_size=48, seed=4),
        llm=LanguageSize(width=16, layers=1, heads=2, key_value_heads=1, ffn=16, vocabulary=480),
        vision=VisionSize(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
        processes=1,
    )
    run(cfg)
    manifest = read_manifest(tmp_path / "out")
    assert {name: split["images"] for name, split in manifest["splits"].items()} == {
        "pretrain": 3,
        "sft": 2,
        "heldout": 7,
    }
    for part in ("data", "llm", "vision"):
        assert manifest["settings"][part].items() >= dataclasses.asdict(getattr(cfg, part)).items()
