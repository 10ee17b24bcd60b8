"""Skip plans on transformers' own vision-language models: ``with apply(model, plan): model.generate(...)``."""

from skipvision_train.adapters.apply import AppliedPlan, apply

__all__ = ["AppliedPlan", "apply"]
