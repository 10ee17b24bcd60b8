"""Skip plans: what a plan is, how a batch is laid out, and the executor that runs a plan on a model.

Imports neither Hydra nor a tokenizer nor the trainer.
"""

from skipvision_train.plans.cache import bytes_held
from skipvision_train.plans.executor import Attachment, attach
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.methods import (
    dense,
    fastv,
    ffn_skip,
    pyramiddrop,
    shortv,
    skip_ffn,
    skip_kv,
    sparsevlm,
    victor,
    vskip,
    vtw,
)
from skipvision_train.plans.plan import SkipPlan, compose
from skipvision_train.plans.presets import preset
from skipvision_train.plans.rules import DENSE_RULE, VISUAL, Drop, Kinds, LayerRule, TokenKind

__all__ = [
    "DENSE_RULE",
    "VISUAL",
    "Attachment",
    "Drop",
    "Kinds",
    "LayerRule",
    "SkipPlan",
    "TokenKind",
    "TokenLayout",
    "attach",
    "bytes_held",
    "compose",
    "dense",
    "fastv",
    "ffn_skip",
    "find_decoder",
    "preset",
    "pyramiddrop",
    "shortv",
    "skip_ffn",
    "skip_kv",
    "sparsevlm",
    "victor",
    "vskip",
    "vtw",
]
