"""Import this to load Skip-Vision models through ``AutoConfig``, ``AutoModelForImageTextToText``, ``AutoProcessor``."""

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

__all__ = ["SkipVisionConfig", "SkipVisionForConditionalGeneration", "SkipVisionProcessor"]
