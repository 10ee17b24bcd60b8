"""Skip plans on transformers' own vision-language models: ``with apply(model, plan): model.generate(...)``."""

from skipvision_train.adapters.apply import AppliedPlan, apply
from skipvision_train.adapters.prompts import answer_starts

__all__ = ["AppliedPlan", "answer_starts", "apply"]
