"""One process under ZeRO-3, three steps with the loss in slices: prints which layers found the LM head gathered."""

from __future__ import annotations

import deepspeed
import torch
from conftest import make_config
from test_loss import batch_of

from skipvision_train.models import loss
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    slices, chunked = [], loss.chunked_losses
    loss.SLICE = 2000
    loss.chunked_losses = lambda *args, **more: (slices.append(1), chunked(*args, **more))[1]
    model = SkipVisionForConditionalGeneration(make_config()).train()
    model.train_with("chunked", True)
    batch = batch_of(model)
    weight = model.language_model.lm_head.weight
    gathered = []
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": ZERO3, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    settings["zero_force_ds_cpu_optimizer"] = False
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(lambda *_: gathered.append(weight.numel() > 0))
    for _ in range(3):
        engine.backward(engine(**batch).loss)
        engine.step()
    print("gathered", sum(gathered), "of", len(gathered), "steps in slices", len(slices))


if __name__ == "__main__":
    main()
