"""A training batch on its way through the model: where does the host wait for a GPU, real or simulated? Nowhere.

What the host decides it decides with numbers of its own, and kernels are queued ahead of the GPU.
"""

from functools import partial

import pytest
import torch
from model_settings import IMAGE, SETTINGS, build
from simulated_gpu import simulated_gpu

from skipvision_train.data.processor import Example
from skipvision_train.plans import TokenKind, dense, fastv, pyramiddrop, skip_ffn, sparsevlm, vskip
from skipvision_train.plans.transfer import upload
from skipvision_train.training.batching import TrainCollator
from skipvision_train.training.facts import FACTS, FactsCollator, model_inputs

PLANS = {
    "dense": dense(),
    "skip_ffn": skip_ffn(),
    "vskip": vskip([0, 2], bypass="norm"),
    "fastv": fastv(1),
    "pyramiddrop": pyramiddrop([1, 2], keep=[0.6, 0.3]),
    "sparsevlm": sparsevlm(layers=[0, 1], keep=[0.6, 0.3]),
    "sparsevlm+": sparsevlm(version=2, layers=[0, 1], keep=[0.6, 0.3]),
}


def sample(model, *parts, seed=0):
    """An example of text tokens and images of so many tiles: its last three tokens are the answer."""
    ids, kinds, tiles = [], [], []
    for part in parts:
        if isinstance(part, str):
            image = model.config.image_token_kinds(int(part))
            tiles.append(int(part))
        ids += [IMAGE] * len(image) if isinstance(part, str) else [part]
        kinds += image if isinstance(part, str) else [TokenKind.TEXT]
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    size = model.config.vision_config.image_size
    pixels = torch.randn(sum(tiles), 3, size, size, generator=torch.Generator().manual_seed(seed)) if tiles else None
    return Example(ids, labels, [int(kind) for kind in kinds], pixels, tuple(tiles), str(seed), "a")


def rows(model):
    """Two images and text, one image, text alone: ragged, with different numbers of tiles where there are several."""
    counts = model.config.tiling_config.counts
    few, many = str(counts[0]), str(counts[-1])
    return [
        sample(model, 5, few, 6, many, 7, 8, 9, seed=1),
        sample(model, many, 10, 11, 12, 13, seed=2),
        sample(model, 14, 15, 16, 17, 18, seed=3),
    ]


def loss_of(model, items, pack, device, ready=lambda: None):
    """The loss of a batch as the trainer feeds it; ``ready`` is called when the batch is on the device."""
    batch = FactsCollator(TrainCollator(0, None, pack), ["a"])(items)
    facts = batch.pop(FACTS)
    tensors = {name: upload(tensor, device) for name, tensor in batch.items()}
    ready()
    return model(**model_inputs(tensors, facts), num_items_in_batch=9).loss.detach()


def check(model, items, pack=None):
    """On a GPU, with packed attention, the loss is the CPU's, and nothing waits."""
    expected = loss_of(model, items, pack, torch.device("cpu")).item()
    gpu = torch.device("cuda")
    if torch.cuda.is_available():
        model.to(gpu, torch.bfloat16)
        try:
            found = loss_of(model, items, pack, gpu, partial(torch.cuda.set_sync_debug_mode, "error"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.item() == pytest.approx(expected, rel=0.03)
        return
    with simulated_gpu() as simulated:
        model.to(gpu)
        found = loss_of(model, items, pack, gpu, simulated.waits.clear)
        assert simulated.waits == []
        assert simulated.packed
    assert found.inner.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_setting(config_factory, name, plan):
    model = build(config_factory, name).train()
    model.set_plan(PLANS[plan])
    model.train_with("chunked", read_supervised=True)
    check(model, rows(model))


@pytest.mark.parametrize("plan", ["dense", "skip_ffn", "vskip", "fastv"])
def test_packed_rows(config_factory, plan):
    model = build(config_factory, "separate_rounds").train()
    model.set_plan(PLANS[plan])
    model.train_with("chunked", read_supervised=True)
    items = rows(model)
    check(model, [[items[1], items[2]], [items[0]]], pack=80)


def test_a_batch_without_images(config_factory):
    model = build(config_factory, "sv_llava").train()
    model.train_with("chunked", read_supervised=True)
    check(model, rows(model)[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is there")
def test_what_the_simulated_gpu_sees():
    """The check can fail: each kind of waiting is noted, and two devices do not mix."""
    table, index = torch.arange(6.0), torch.tensor([1, 2])
    ways = {
        "a value read": lambda t: t.sum().item(),
        "a size that depends on values": lambda t: t.nonzero(),
        "a mask as an index": lambda t: t[t > 2],
        "copied to the host": lambda t: t.tolist(),
        "copied from the host, unpinned or blocking": lambda t: index.to("cuda"),
        "indices on the host": lambda t: t[index],
    }
    with simulated_gpu() as gpu:
        on_gpu = upload(table, torch.device("cuda"))
        on_gpu[on_gpu > 2] = 0.0
        assert gpu.waits == []
        for what, wait in ways.items():
            wait(on_gpu)
            assert [line.partition(":")[0] for line in gpu.waits] == [what]
            gpu.waits.clear()
        with pytest.raises(TypeError):
            on_gpu.numpy()
        with pytest.raises(RuntimeError, match="tensors on cpu and cuda"):
            on_gpu + table
        assert torch.equal(on_gpu.inner, torch.tensor([0.0, 1, 2, 0, 0, 0]))
