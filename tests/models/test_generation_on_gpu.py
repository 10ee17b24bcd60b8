"""Generation on a GPU, a real or a simulated one: no tensor is left behind, and the tokens are the CPU's."""

import pytest
import torch
from model_settings import build, make_batch, some_tiles
from simulated_gpu import a_gpu, simulated_gpu
from tiny_vlms import make_family

from skipvision_train import apply
from skipvision_train.plans import compose, dense, fastv, pyramiddrop, skip_ffn, skip_kv, sparsevlm, vskip, vtw
from skipvision_train.plans.cache import evicted_layers

PLANS = [
    dense(),
    skip_ffn(),
    skip_kv("all but summary", evict_when="before_first_token"),
    vskip([0, 2], bypass="norm"),
    vtw(1),
    fastv(1),
    pyramiddrop([1, 2], keep=[0.6, 0.3], positions="keep"),
    sparsevlm(version=2, layers=[0, 1], keep=[0.6, 0.3]),
    compose([skip_ffn(), vskip([1])]),
]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def on_gpu(batch):
    return {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", ["separate_rounds", "sv_llava", "sv_llava_hd", "visionzip"])
def test_our_model(config_factory, name, plan):
    model = build(config_factory, name)
    model.set_plan(plan)
    batch = make_batch(model, [[5, "i", 6, 7], ["i", 8, "i", 9, 10], [11, 12]], some_tiles(model, 3))
    expected = model.generate(**batch, **OPTIONS)
    with a_gpu():
        found = model.to("cuda").generate(**on_gpu(batch), **OPTIONS).cpu()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("plan", [skip_ffn(), fastv(1)], ids=lambda plan: plan.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family, plan):
    made = make_family(family)
    batch = made.inputs(0, 1, 2)
    with apply(made.model, plan):
        expected = made.model.generate(**batch, **OPTIONS)
        with a_gpu():
            found = made.model.to("cuda").generate(**on_gpu(batch), **OPTIONS).cpu()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is there")
def test_layers_that_hold_the_same_share_what_they_hold(config_factory):
    """A step of decoding makes a mask and a rotary embedding for every tensor of columns, not for every layer."""
    model = build(config_factory, "sv_llava")
    batch = make_batch(model, [[5, "i", 6, 7], ["i", 8]], some_tiles(model, 2))
    with simulated_gpu() as gpu:
        made = model.to("cuda").generate(**on_gpu(batch), **OPTIONS, return_dict_in_generate=True)
        layers = evicted_layers(made.past_key_values).values()
        assert len(layers) == 3
        assert len({id(layer.columns) for layer in layers}) == 1
        assert sum("plans/executor.py" in wait for wait in gpu.waits) <= 4
