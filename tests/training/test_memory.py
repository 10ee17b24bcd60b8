from __future__ import annotations

import pytest
import torch

from skipvision_train.errors import TrainingError
from skipvision_train.training.memory import Rows, check_memory, estimate_activations
from skipvision_train.training.run import assemble


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_against_what_autograd_keeps(make_cfg, checkpointing):
    """Bytes of the different storages that a forward pass saves, the weights left out."""
    cfg = make_cfg(
        "plan.method=dense", "stage.lr.vision=null", "stage.lr.connector=null", "stage.lr.reducer=null",
        f"trainer.gradient_checkpointing={str(checkpointing).lower()}",
    )  # fmt: skip
    parts = assemble(cfg)
    parts.model.train()
    parts.model.train_with("plain", read_supervised=False)  # the estimate is of whole layers
    batch = parts.collator([parts.feed.dataset[i] for i in range(2)])
    weights = {p.untyped_storage().data_ptr() for p in parts.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = parts.model(**batch).loss
    rows, length = batch["input_ids"].shape
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    estimate = estimate_activations(
        parts.model.config, Rows(rows, length, 0, supervised), "fp32", checkpointing, vision_trains=False
    )
    assert loss.requires_grad
    if checkpointing:
        assert sum(kept.values()) < estimate  # the layer that is recomputed is not there yet
    else:
        assert estimate == pytest.approx(sum(kept.values()), rel=0.35)


def test_too_small_a_device_says_by_how_much_and_what_to_change(make_cfg):
    cfg = make_cfg("trainer.per_device_batch=4")
    config = assemble(cfg).model.config
    gigabytes = 16 * 10**9  # of 10^9 weights in fp32 with AdamW
    with pytest.raises(TrainingError, match=r"take 16.0 GB .* has 10.0 GB: 6.0 GB too little.*checkpointing=true.*=2"):
        check_memory(cfg, config, 10**9, 10**9, 1, 10e9)
    check_memory(cfg, config, 10**9, 10**9, 1, gigabytes + 1e9)


def test_a_warning_instead(make_cfg, caplog):
    cfg = make_cfg("trainer.guards.memory=warn")
    check_memory(cfg, assemble(cfg).model.config, 10**9, 10**9, 1, 10e9)
    assert "6.0 GB too little" in caplog.text


def test_activations_that_do_not_fit_are_a_warning(make_cfg, caplog):
    cfg = make_cfg()
    check_memory(cfg, assemble(cfg).model.config, 10**6, 10**6, 1, 16e6 + 1)
    assert "the longest rows may take" in caplog.text


def test_offloaded_states_are_not_on_the_device(make_cfg):
    cfg = make_cfg("deepspeed.stage=2", "deepspeed.offload_optimizer=true")
    check_memory(cfg, assemble(cfg).model.config, 10**9, 10**9, 1, 9e9)
