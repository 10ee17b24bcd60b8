"""The plug-in for lmms-eval: ``lmms-eval --model skipvision --model_args pretrained=DIRECTORY,...``.

``docs/benchmarks.md`` has the commands. lmms-eval needs an environment of its own, without Hydra.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that lmms-eval finds by the entry point ``lmms_eval.models``: ``ModelManifest``s, one here.

    Nothing heavy is imported: every start of lmms-eval calls this, whatever model it is asked for.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("skipvision", simple_class_path="skipvision_train.evaluation.lmms_eval.model.SkipVision")]
