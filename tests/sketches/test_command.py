"""``skipvision sketches``: its settings are those of the generator, and it writes the folder it is told to."""

import dataclasses

from skipvision_train.commands.sketches import Config, DataConfig, LanguageConfig, VisionConfig, run
from skipvision_train.sketches.settings import SketchSettings
from skipvision_train.sketches.writer import read_manifest


def test_defaults_of_the_command_are_those_of_the_generator():
    settings = dataclasses.asdict(SketchSettings())
    for part in ("data", "llm", "vision"):
        for name, value in dataclasses.asdict(getattr(Config(), part)).items():
            assert settings[part][name] == value, f"{part}.{name}"


def test_run_writes_the_sizes_asked_for(tmp_path):
    cfg = Config(
        output=str(tmp_path / "out"),
        data=DataConfig(pretrain=3, sft=2, heldout=7, image_size=48, seed=4),
        llm=LanguageConfig(width=16, layers=1, heads=2, key_value_heads=1, ffn=16, vocabulary=480),
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
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
