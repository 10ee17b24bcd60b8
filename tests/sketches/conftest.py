"""One small written data set, shared by the tests of this folder."""

import pytest

from skipvision_train.sketches.settings import DataSize, LanguageSize, SketchSettings, VisionSize


@pytest.fixture(scope="session")
def small_settings():
    return SketchSettings(
        DataSize(pretrain=40, sft=40, heldout=28, seed=11),
        LanguageSize(width=32, layers=2, heads=4, key_value_heads=2, ffn=48),
        VisionSize(image_size=24, patch_size=12, width=32, layers=2, head_width=16),
    )


@pytest.fixture(scope="session")
def written(tmp_path_factory, small_settings):
    from skipvision_train.sketches.writer import write_sketches

    root = tmp_path_factory.mktemp("sketches") / "data"
    manifest = write_sketches(root, small_settings, processes=1)
    return root, manifest
