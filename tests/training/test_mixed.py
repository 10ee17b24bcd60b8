"""Text-only rows, rows with different numbers of images, processes with nothing but text."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from launched import launch
from PIL import Image
from transformers import set_seed

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.run import assemble, run_stage

FASTV = ("plan.method=fastv", "plan.layer=1", "plan.keep=0.5")


@pytest.fixture
def mixed(workspace, tmp_path):
    """Records with two images, none, one, none, ...: in order, every second one has none."""
    (tmp_path / "images").mkdir()
    records = []
    for number in range(8):
        answer = {"from": "gpt", "value": "blue " * (number % 3 + 1)}
        record = {"id": number, "conversations": [{"from": "human", "value": "name a colour"}, answer]}
        if number % 2 == 0:
            files = [f"{number}-{i}.png" for i in range(2 if number % 4 == 0 else 1)]
            for i, file in enumerate(files):
                Image.new("RGB", (32, 32), (30 * number, 90 * i, 40)).save(tmp_path / "images" / file)
            record["image"] = files
            record["conversations"][0]["value"] = "<image>\n" * len(files) + "which colours?"
        records.append(record)
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = {"name": "mixed", "path": "data.json", "image_root": "images"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    return f"data.recipe={tmp_path / 'recipe.yaml'}"


@pytest.mark.parametrize("plan", [(), ("plan.method=dense",), FASTV], ids=["skip_ffn", "dense", "fastv"])
@pytest.mark.parametrize("pack", [False, True])
def test_gradients_are_those_of_the_samples_one_by_one(make_cfg, mixed, plan, pack):
    """A batch of all eight records against the sum over single ones, divided by the supervised tokens of all."""
    cfg = make_cfg(mixed, *plan, "trainer.last_layer=supervised")
    set_seed(0)
    parts = assemble(cfg)
    model, examples = parts.model.train(), [parts.feed.dataset[i] for i in range(8)]
    tokens = sum(sum(label != -100 for label in example.labels) for example in examples)
    images = [example.pixel_values is not None and len(example.pixel_values) for example in examples]
    assert images == [2, False, 1, False, 2, False, 1, False]

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            model(**batch, num_items_in_batch=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.train_with("plain", read_supervised=False)
    single = gradients(parts.collator([example]) for example in examples)
    model.train_with("chunked", read_supervised=True)
    if pack:
        parts.collator.pack_length = 512
        batches = [parts.collator([examples[:3], examples[3:4]]), parts.collator([examples[4:]])]
    else:
        batches = [parts.collator(examples[:5]), parts.collator(examples[5:6]), parts.collator(examples[6:])]
    for name, gradient in gradients(batches).items():
        torch.testing.assert_close(gradient, single[name], rtol=1e-4, atol=3e-6, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "plan", [(), FASTV, ("trainer.gradient_checkpointing=true",)], ids=["skip_ffn", "fastv", "recomputed"]
)
def test_a_process_that_sees_only_text_under_zero3(make_cfg, workspace, mixed, tmp_path, plan):
    """Two processes for 50 steps; one gets the records with images, the other those without."""
    changes = (mixed, *plan, "data.order=sequential", "trainer.global_batch=2", "trainer.max_steps=50")
    changes += ("trainer.per_device_batch=1", "trainer.save_every=0")
    zero3 = ("deepspeed=zero3", "deepspeed.persistence_threshold=0")
    launch(workspace, tmp_path / "two", *changes, *zero3)
    run_stage(make_cfg(*changes, f"trainer.output_dir={tmp_path / 'one'}"))
    two, one = ([row["loss"] for row in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("two", "one"))
    assert len(two) == 50
    # Rounding grows over 50 steps of Adam; measured at most 1e-5.
    assert two == pytest.approx(one, rel=2e-4)
