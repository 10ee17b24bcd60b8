"""The whole model in every setting: LLaVA, LLaVA-HD, CoS, each dense or Skip-Vision, and the reducers beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_settings import IMAGE, SETTINGS, VISION, build, make_batch, some_tiles

from skipvision_train.errors import ConfigError
from skipvision_train.models.merging import merge_tokens
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import TokenKind, fastv, skip_ffn, victor


@pytest.mark.parametrize("name", SETTINGS)
def test_layout_agrees_with_what_the_model_makes(config_factory, name):
    model = build(config_factory, name)
    tiles = some_tiles(model, 4)
    batch = make_batch(model, [["i", "i", 5], ["i", "i"]], tiles)
    with torch.no_grad():
        images = model.encode_images(batch["pixel_values"], torch.tensor(tiles)).split()
    assert [len(image) for image in images] == [len(model.config.image_token_kinds(count)) for count in tiles]
    assert all(image.shape[1] == 32 and image.isfinite().all() for image in images)


@pytest.mark.parametrize("name", SETTINGS)
def test_batched_equals_one_by_one(config_factory, name):
    """Images of different numbers of tiles, several in a row, none in another: logits and generated ids."""
    model = build(config_factory, name)
    rows = [[5, "i", 6, 7], ["i", 8, "i", 9, 10], [11, 12], [13, 14, 15, "i"]]
    tiles = some_tiles(model, 4)
    together = make_batch(model, rows, tiles)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
    written = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    image = 0
    for i, row in enumerate(rows):
        own = tiles[image : image + row.count("i")]
        single = make_batch(model, [row], own)
        start = sum(tiles[:image])
        if own:
            single["pixel_values"] = together["pixel_values"][start : start + sum(own)]
        image += len(own)
        with torch.no_grad():
            torch.testing.assert_close(model(**single).logits[0, -1], logits[i], atol=2e-5, rtol=1e-4)
        alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert alone.tolist() == written[i].tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter_gets_a_gradient(config_factory, name):
    model = build(config_factory, name).train()
    batch = make_batch(model, [[5, "i", 6, 7], ["i", 8, 9]], some_tiles(model, 2))
    model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)).loss.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    # A key's bias shifts all scores of a query alike, which the softmax cancels: its gradient is 0 up to rounding.
    assert not {n for n in silent if not n.endswith("key.bias")}


@pytest.mark.parametrize("name", ["sv_llava_hd", "visionzip", "mqt"])
def test_a_text_only_batch_runs_every_module_of_the_visual_path(config_factory, name):
    model = build(config_factory, name).train()
    calls: dict[str, int] = {}
    for part, module in model.named_modules():
        if part.startswith(("vision_tower", "connector", "reducer")):
            module.register_forward_hook(lambda *_, part=part: calls.update({part: calls.get(part, 0) + 1}))
    with_image = make_batch(model, [[5, "i", 6]], some_tiles(model, 1))
    model(**with_image, labels=with_image["input_ids"])
    expected = dict(calls)
    calls.clear()
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    loss = model(**text, labels=text["input_ids"]).loss
    assert calls == expected
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.vision_tower.parameters())


def test_saved_and_loaded_is_the_same_model(config_factory, tmp_path):
    for name in ("sv_llava_hd", "sv_llava", "mqt", "token_packer", "visionzip"):
        model = build(config_factory, name)
        model.save_pretrained(tmp_path / name)
        again = SkipVisionForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        again.set_plan(skip_ffn())
        batch = make_batch(model, [[5, "i", 6]], some_tiles(model, 1))
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_retained_tokens_are_those_the_class_token_attends_to(config_factory):
    """Written out on the tower's own readout: top 4 in raster order, the rest merged to 5, summaries around them."""
    model = build(config_factory, "sv_llava")
    pixels = make_batch(model, [["i"]], [1])["pixel_values"]
    with torch.no_grad():
        features = model.vision_tower(pixels)
        tokens = model.connector(features)[0][0]
        best = sorted(features.saliency[0].topk(4).indices.tolist())
        rest = merge_tokens(tokens[[i for i in range(16) if i not in best]][None], 5)[0]
        (image,) = model.encode_images(pixels).split()
        torch.testing.assert_close(image[:4], tokens[best])
        torch.testing.assert_close(image[5:10], rest)
        torch.testing.assert_close(image[10], model.reducer.summary(rest[None])[0, 0])
        torch.testing.assert_close(image[4], model.reducer.summary(tokens[best][None])[0, 0])


def test_the_global_view_is_retained_and_tiles_are_merged_together(config_factory):
    model = build(config_factory, "sv_llava_hd")
    pixels = make_batch(model, [["i"]], [3])["pixel_values"]
    with torch.no_grad():
        tokens = model.connector(model.vision_tower(pixels))[0]
        (image,) = model.encode_images(pixels, torch.tensor([3])).split()
        torch.testing.assert_close(image[:16], tokens[0])
        torch.testing.assert_close(image[17:22], merge_tokens(tokens[1:].flatten(0, 1)[None], 5)[0])


def test_a_batch_chooses_how_many_queries_it_uses(config_factory):
    model = build(config_factory, "mqt")
    batch = make_batch(model, [[5, "i", 6], ["i", 7]], [1, 1])
    fewer = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    fewer["input_ids"] = torch.tensor([[5, *[IMAGE] * 4, 6], [0, *[IMAGE] * 4, 7]])
    fewer["attention_mask"] = (fewer["input_ids"] != 0).long()
    fewer["token_kinds"] = torch.where(fewer["input_ids"] == IMAGE, int(TokenKind.RETAINED), int(TokenKind.TEXT))
    with torch.no_grad():
        four = model.encode_images(batch["pixel_values"], queries=4).split()
        nine = model.encode_images(batch["pixel_values"]).split()
        for few, many in zip(four, nine, strict=True):
            torch.testing.assert_close(few, many[:4])
        embeds = model._embed(fewer["input_ids"], fewer["pixel_values"], None)
        torch.testing.assert_close(embeds[0, 1:5], four[0])
        assert model(**fewer).logits.shape == (2, 6, 320)


@pytest.mark.parametrize("name", ["sv_llava_hd", "mqt_tiles"])
def test_beams_carry_all_tiles_of_their_row(config_factory, name, monkeypatch):
    """With the elastic number of queries, too, where tokens alone do not tell how many tiles there are."""
    monkeypatch.setitem(SETTINGS, "mqt_tiles", (*SETTINGS["mqt"][:2], SETTINGS["sv_llava_hd"][2]))
    model = build(config_factory, name)
    batch = make_batch(model, [[5, "i", 6, "i"], ["i", 7, 8]], [2, 4, 3])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(**batch, num_beams=3, **options)[:, batch["input_ids"].shape[1] :]
    listed = model.generate(**batch | {"image_tiles": [2, 4, 3]}, num_beams=3, **options)
    assert torch.equal(listed[:, batch["input_ids"].shape[1] :], together)
    for i, (row, own, start) in enumerate([([5, "i", 6, "i"], [2, 4], 0), (["i", 7, 8], [3], 6)]):
        single = make_batch(model, [row], own)
        single["pixel_values"] = batch["pixel_values"][start : start + sum(own)]
        alone = model.generate(**single, num_beams=3, **options)[0, single["input_ids"].shape[1] :]
        assert alone.tolist() == together[i].tolist()


def test_wrong_numbers_of_tiles_are_named(config_factory):
    model = build(config_factory, "sv_llava_hd_unmerged")
    batch = make_batch(model, [[5, "i", 6]], [3])
    with pytest.raises(ValueError, match=r"hold 50 placeholders; the 1 images have 34"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2], "image_tiles": torch.tensor([2])})
    with pytest.raises(ValueError, match=r"tiles: 3 of 1 images, but the connector made 2"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ConfigError, match=r"^tiles: 5; an image has 2 or 3 or 4$"):
        model.token_kinds(batch["input_ids"], image_tiles=torch.tensor([5]))


@pytest.mark.parametrize("plan", [fastv(1, 0.5), victor(1, 2)], ids=lambda plan: plan.name)
def test_plans_of_other_methods_train_in_the_llava_setting(config_factory, plan):
    connector, reducer, tiling = SETTINGS["llava"]
    reducer = replace(reducer, registers=plan.registers)
    config = config_factory(vision=VISION, connector=connector, reducer=reducer, tiling=tiling)
    model = SkipVisionForConditionalGeneration(config).train()
    model.set_plan(plan)
    batch = make_batch(model, [[5, "i", 6, 7], ["i", 8, 9]], [1, 1])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    model(**batch, labels=labels).loss.backward()
    assert model.connector[0].weight.grad.abs().max() > 0
