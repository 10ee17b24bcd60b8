"""A process of a stage in which one rank goes wrong; started by a launcher: ``faulty_stage.py CFG FAULT RESULT``.

``RESULT`` is a folder: every rank writes what it saw around the faulty step.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
from pathlib import Path

import torch
from transformers import TrainerCallback

from skipvision_train.errors import SkipVisionError
from skipvision_train.training.run import run_stage

FAULTY_STEP = 2
"""Steps done before it."""


def base_optimizer(optimizer):
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def snapshot(model, optimizer):
    """Copies of this process's weights, and of its share of Adam's moments."""
    weights = [getattr(p, "ds_tensor", p).detach().clone() for p in model.parameters()]
    moments = [v.clone() for state in base_optimizer(optimizer).state.values() for v in state.values()]
    return weights, moments


class Poison(TrainerCallback):
    """The logits of this process are not finite in one step; notes whether the step changed anything."""

    def __init__(self, poisons):
        self.poisons = poisons
        self.seen = {}

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step != FAULTY_STEP:
            return
        self.before = snapshot(model, optimizer)
        if self.poisons:
            head = model.language_model.lm_head
            self.hook = head.register_forward_hook(lambda module, inputs, output: output * torch.inf)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step != FAULTY_STEP + 1:
            return
        if self.poisons:
            self.hook.remove()
        after = snapshot(model, optimizer)
        for name, old, new in zip(("weights", "moments"), self.before, after, strict=True):
            self.seen[name] = len(old) > 0 and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


class Hang(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == FAULTY_STEP:
            threading.Event().wait()


def main():
    cfg, fault, result = pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2], Path(sys.argv[3])
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    callbacks = ()
    if fault == "poison":
        callbacks = (Poison(last),)
    elif fault == "hang" and last:
        callbacks = (Hang(),)
    elif fault == "configuration" and last:
        cfg.stage.weight_decay = 0.125
    try:
        run_stage(cfg, callbacks)
    except SkipVisionError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    if fault == "poison":
        (result / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(callbacks[0].seen))


if __name__ == "__main__":
    main()
