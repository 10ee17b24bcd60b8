"""Skip plans: what a plan is, how a batch is laid out, and the executor that runs a plan on a model.

Imports neither Hydra nor a tokenizer nor the trainer.
"""

from skipvision_train.plans.cache import bytes_held
from skipvision_train.plans.executor import Attachment, attach, find_decoder
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.methods import dense, ffn_skip, shortv, skip_ffn, vskip
from skipvision_train.plans.plan import DENSE_RULE, VISUAL, Kinds, LayerRule, SkipPlan, TokenKind, compose

__all__ = [
    "DENSE_RULE",
    "VISUAL",
    "Attachment",
    "Kinds",
    "LayerRule",
    "SkipPlan",
    "TokenKind",
    "TokenLayout",
    "attach",
    "bytes_held",
    "compose",
    "dense",
    "ffn_skip",
    "find_decoder",
    "shortv",
    "skip_ffn",
    "vskip",
]
