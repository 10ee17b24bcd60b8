"""Train and run vision-language models that skip the visual computation that teaches them nothing.

The names below are imported when they are first used, so that ``import skipvision_train`` and ``skipvision --help``
stay instant. ``import skipvision_train.auto`` makes transformers' Auto classes know the model.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Assistant": "skipvision_train.inference",
    "Conversation": "skipvision_train.inference",
    "Sampling": "skipvision_train.inference",
    "SkipPlan": "skipvision_train.plans",
    "SkipVisionConfig": "skipvision_train.models.configuration",
    "SkipVisionForConditionalGeneration": "skipvision_train.models.modeling",
    "SkipVisionProcessor": "skipvision_train.data.processor",
    "TokenKind": "skipvision_train.plans",
    "apply": "skipvision_train.adapters",
    "attach": "skipvision_train.plans",
}
_MODULES = ("plans",)  # skipvision_train.plans.vskip(...) after "import skipvision_train" alone

__all__ = [
    "Assistant",
    "Conversation",
    "Sampling",
    "SkipPlan",
    "SkipVisionConfig",
    "SkipVisionForConditionalGeneration",
    "SkipVisionProcessor",
    "TokenKind",
    "apply",
    "attach",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
