"""Several samples in one row: each gets the logits, the loss and the gradients that it gets alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from skipvision_train.data.collate import collate, collate_packed
from skipvision_train.data.processor import Example
from skipvision_train.errors import PlanError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, TilingConfig
from skipvision_train.plans import VISUAL, TokenKind, compose, dense, fastv, pyramiddrop, shortv, skip_ffn, vskip, vtw

IMAGE, LAYERS = 3, 3
PLANS = {
    "dense": dense(),
    "skip_ffn": skip_ffn(),
    "vskip": vskip([0, 2], bypass="norm"),
    "fastv": fastv(1, 0.5, VISUAL),
    "pyramiddrop": pyramiddrop((1, 2), (0.6, 0.3)),
    "vtw": vtw(2),
    "mixed": compose([fastv(1, 0.5, frozenset({TokenKind.SKIPPED})), skip_ffn(), shortv([2])]),
}


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return SkipVisionForConditionalGeneration(tiny_config).eval()


def sample(config, *parts, tiles=1, seed=0):
    """One example: numbers are text, supervised if above 100; ``"i"`` is an image of so many tiles."""
    kinds = [int(kind) for kind in config.image_token_kinds(tiles)]
    ids, labels, token_kinds, images = [], [], [], 0
    for part in parts:
        own = [IMAGE] * len(kinds) if part == "i" else [part]
        ids += own
        token_kinds += kinds if part == "i" else [int(TokenKind.TEXT)]
        labels += own if part != "i" and part > 100 else [-100] * len(own)
        images += part == "i"
    size = config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images * tiles, 3, size, size, generator=generator) if images else None
    return Example(ids, labels, token_kinds, pixels, (tiles,) * images)


def samples(config):
    """Images in several documents, twice in one, in none; answers in several turns."""
    return [
        sample(config, 5, "i", 6, 101, 102, seed=1),
        sample(config, 7, 8, 103, 104, 105),
        sample(config, 9, "i", 10, 106, 11, 107, "i", 12, 108, seed=2),
        sample(config, 13, 14, "i", 15, 109, seed=3),
    ]


def alone(model, example):
    return model(**{key: v for key, v in collate([example], "right", 0).items() if key != "labels"}).logits[0]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[2], [0, 1]], [[1, 1, 3], [2, 0]]])
@torch.no_grad()
def test_logits_are_those_of_each_sample_alone(model, name, rows):
    model.set_plan(PLANS[name].bind(LAYERS))
    every = samples(model.config)
    # Without answers: what ranks visual tokens is the last token of a document, packed or not.
    packed = collate_packed([[every[i] for i in row] for row in rows], pad_id=0)
    labels = packed.pop("labels")
    logits = model(**packed).logits
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            stop = start + len(every[i].input_ids)
            torch.testing.assert_close(logits[row, start:stop], alone(model, every[i]), atol=1e-5, rtol=1e-4)
            start = stop
    assert labels.shape == logits.shape[:2]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", PLANS)
def test_loss_and_gradients_are_those_of_the_samples_alone(model, name):
    model.train()
    model.set_plan(PLANS[name].bind(LAYERS))
    every = samples(model.config)
    total = sum(sum(label != -100 for label in example.labels[1:]) for example in every)
    apart = sum(model(**collate([e], "right", 0), num_items_in_batch=total).loss for e in every)
    apart.backward()
    expected = gradients(model)
    batch = collate_packed([every[:3], every[3:]], pad_id=0)
    assert int((batch["labels"][:, 1:] != -100).sum()) == total
    loss = model(**batch, num_items_in_batch=total).loss
    loss.backward()
    torch.testing.assert_close(loss, apart, atol=1e-6, rtol=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], atol=1e-5, rtol=1e-3, msg=parameter)
    torch.testing.assert_close(model(**batch).loss, loss, atol=1e-6, rtol=1e-5)  # the batch's own number is the total


def test_images_cut_into_tiles(config_factory):
    torch.manual_seed(0)
    config = config_factory(
        tiling=TilingConfig("aspect", 3), reducer=ReducerConfig(split="tiles", local_keep=20, former_over="retained")
    )
    model = SkipVisionForConditionalGeneration(config).eval()
    model.set_plan(skip_ffn().bind(LAYERS))
    counts = config.tiling_config.counts
    every = [sample(config, 5, "i", 6, 101, tiles=tiles, seed=tiles) for tiles in (counts[0], counts[-1])]
    packed = collate_packed([every], pad_id=0)
    packed.pop("labels")
    with torch.no_grad():
        logits = model(**packed).logits[0]
        apart = [alone(model, example) for example in every]
    torch.testing.assert_close(logits, torch.cat(apart), atol=1e-5, rtol=1e-4)


def test_no_label_is_predicted_from_another_document(model):
    """Even where the batch supervises a first token: its loss would come from the document before."""
    batch = collate_packed([samples(model.config)[:2]], pad_id=0)
    start = int((batch["document_ids"][0] == 1).int().argmax())
    wrong = {**batch, "labels": batch["labels"].clone()}
    wrong["labels"][0, start] = 200
    with torch.no_grad():
        assert torch.equal(model(**wrong).loss, model(**batch).loss)
        one_row = {key: value for key, value in wrong.items() if key != "document_ids"}
        assert (model(**one_row).loss - model(**batch).loss).abs() > 1e-3


@torch.no_grad()
def test_one_document_per_row_is_the_unpacked_batch(model):
    every = samples(model.config)
    packed, plain = collate_packed([[e] for e in every], 0), collate(every, "right", 0)
    assert torch.equal(packed.pop("document_ids") >= 0, plain["attention_mask"] == 1)
    assert all(torch.equal(packed[key], plain[key]) for key in plain)
    documents = {"document_ids": torch.where(plain["attention_mask"] == 1, 0, -1)}
    torch.testing.assert_close(model(**plain, **documents).loss, model(**plain).loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_implementations(tiny_config, attention):
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(tiny_config.text_config, attn_implementation=attention)
    model = SkipVisionForConditionalGeneration(tiny_config, language_model).eval()
    every = samples(tiny_config)
    packed = collate_packed([every], 0)
    packed.pop("labels")
    apart = torch.cat([alone(model, example) for example in every])
    torch.testing.assert_close(model(**packed).logits[0], apart, atol=1e-5, rtol=1e-4)


def test_an_attention_that_takes_no_mask_is_refused(model):
    model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PlanError, match="'flash_attention_2' takes no mask of its own, which packed documents"):
        model(**collate_packed([samples(model.config)], 0))


def test_gradient_checkpointing(model):
    batch = collate_packed([samples(model.config)], 0)
    model.train()
    plain = model(**batch).loss
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model(**batch).loss, plain)


def test_what_a_document_holds_does_not_reach_the_others(model):
    """An own check of the mask: change every token of one document and look at the others' losses, one by one."""
    rng = random.Random(0)
    every = samples(model.config)
    batch = collate_packed([every], 0)
    documents, labels = batch["document_ids"][0], batch.pop("labels")[0]

    def losses(ids):
        with torch.no_grad():
            logits = model(**{**batch, "input_ids": ids}).logits[0]
        each = F.cross_entropy(logits[:-1], labels[1:], reduction="none")
        return [each[documents[1:] == i].sum() for i in range(len(every))]

    before = losses(batch["input_ids"])
    for changed in range(len(every)):
        ids = batch["input_ids"].clone()
        text = (documents == changed) & (ids[0] != IMAGE)
        ids[0, text] = torch.tensor([rng.randrange(4, 300) for _ in range(int(text.sum()))])
        after = losses(ids)
        for i in range(len(every)):
            assert (i == changed) != torch.allclose(before[i], after[i], atol=1e-5)
