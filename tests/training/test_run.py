"""Whole stages in one process: what changes, what is written, what a second start does."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from interrupted import InterruptAfter, InterruptionError
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

from skipvision_train.errors import CheckpointError, ConfigError, DataError
from skipvision_train.models.build import start_stage
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import TokenKind
from skipvision_train.training.batching import EpochSampler
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import all_checkpoints
from skipvision_train.training.run import assemble, run_stage
from skipvision_train.training.stages import PARTS


def metrics(cfg):

    return read_metrics(Path(cfg.trainer.output_dir) / "metrics.jsonl")


def losses(cfg):
    return [row["loss"] for row in metrics(cfg)]


STAGES = {
    "connector": ["stage.lr.vision=null", "stage.lr.reducer=null", "stage.lr.llm=null"],
    "llm": ["stage.lr.vision=null", "stage.lr.reducer=null", "stage.lr.connector=null"],
    "all": [],
}


@pytest.mark.parametrize("name", STAGES)
def test_one_step_moves_exactly_the_trainable_parameters(make_cfg, name):
    cfg = make_cfg("trainer.max_steps=1", "trainer.save_every=0", "stage.warmup_ratio=0", *STAGES[name])
    set_seed(cfg.trainer.seed)
    before = {k: v.clone() for k, v in assemble(cfg).model.state_dict().items()}
    after = load_file(run_stage(cfg) / "model.safetensors")
    assert set(after) == set(before)
    trained = set(PARTS) if name == "all" else {name}
    for key, value in after.items():
        part = next(part for part, module in PARTS.items() if key.startswith(f"{module}."))
        assert torch.equal(value, before[key]) == (part not in trained), key


def test_loss_is_per_supervised_token_of_the_global_batch(make_cfg):
    """Against a plain computation, one sample at a time, without padding, accumulation or the trainer."""
    cfg = make_cfg("trainer.max_steps=1", "trainer.save_every=0")
    set_seed(cfg.trainer.seed)
    parts = assemble(cfg)
    parts.model.train()
    total, tokens = 0.0, 0
    for index in list(EpochSampler(12, 4, cfg.trainer.seed))[:4]:
        batch = parts.collator([parts.feed.dataset[index]])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = parts.model(**batch).logits[0, :-1]
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    run_stage(cfg)
    (row,) = metrics(cfg)
    assert row["supervised_tokens"] == tokens
    # Sums of about 50 fp32 terms in another order; measured 5.4e-8.
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-6)


def test_first_and_last_step_are_always_logged(make_cfg):
    cfg = make_cfg("trainer.log_every=10", "trainer.save_every=0")
    run_stage(cfg)
    assert [row["step"] for row in metrics(cfg)] == [1, 4]


def test_metrics(make_cfg):
    cfg = make_cfg()
    run_stage(cfg)
    rows = metrics(cfg)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {"epoch", "loss", "grad_norm", "supervised_tokens", "lr/connector"} <= set(row)
    assert all("samples_per_second" in row for row in rows[1:])
    # One step of warm-up, then a cosine from the peak to 0 over three steps.
    shares = [0.0, 1.0, 0.75, 0.25]
    for part, peak in vars(cfg.stage.lr).items():
        assert [row[f"lr/{part}"] for row in rows] == pytest.approx([peak * share for share in shares])
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("same", [("per_device_batch=4",), ("per_device_batch=1",), ("gradient_checkpointing=true",)])
def test_equivalent_configurations_give_the_same_losses(make_cfg, tmp_path, same):
    reference = make_cfg("trainer.save_every=0")
    run_stage(reference)
    other = make_cfg(
        "trainer.save_every=0", f"trainer.output_dir={tmp_path / 'other'}", *(f"trainer.{s}" for s in same)
    )
    run_stage(other)
    # fp32 sums in another order; measured at most 9.4e-8 (one unit in the last place) over the four steps.
    assert losses(other) == pytest.approx(losses(reference), rel=1e-6)


def test_every_epoch_has_its_own_order(make_cfg, workspace):
    """The supervised tokens of each step are those of the samples that the sampler names."""
    cfg = make_cfg("trainer.max_steps=5", "trainer.save_every=4")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(4),))
    run_stage(cfg)
    records = json.loads((workspace / "data" / "data.json").read_text())
    lengths = [len(record["conversations"][1]["value"].strip()) + 1 for record in records]
    expected = []
    for epoch in (0, 1):
        sampler = EpochSampler(12, 4, cfg.trainer.seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected += [sum(lengths[i] for i in order[start : start + 4]) for start in (0, 4, 8)]
    assert [row["supervised_tokens"] for row in metrics(cfg)] == expected[:5]


@pytest.mark.parametrize("steps", [4, 5])
def test_resumed_equals_uninterrupted(make_cfg, tmp_path, steps):
    """Interrupted within an epoch (steps=4 saves at 2) and, for 5, beyond its end (an epoch has three steps)."""
    changes = [f"trainer.max_steps={steps}", f"trainer.save_every={steps - 2}"]
    whole = make_cfg(f"trainer.output_dir={tmp_path / 'whole'}", *changes)
    run_stage(whole)
    cfg = make_cfg(*changes)
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(steps - 1),))
    assert len(metrics(cfg)) == steps - 1
    final = run_stage(cfg)
    assert [row["step"] for row in metrics(cfg)] == list(range(1, steps + 1))
    assert losses(cfg) == losses(whole)
    ours, theirs = load_file(final / "model.safetensors"), load_file(tmp_path / "whole/model/model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_half_written_checkpoint_is_not_resumed_from(make_cfg, tmp_path, caplog):
    cfg = make_cfg("trainer.max_steps=6", "trainer.keep_checkpoints=0")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(5),))
    broken = tmp_path / "run" / "checkpoint-4" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-10])
    with caplog.at_level("INFO"):
        run_stage(cfg)
    assert "checkpoint-4 is not complete" in caplog.text
    assert f"start from {tmp_path / 'run' / 'checkpoint-2'}" in caplog.text
    assert [row["step"] for row in metrics(cfg)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in all_checkpoints(tmp_path / "run")] == [2, 4, 6]


def test_a_finished_stage_does_nothing(make_cfg, tmp_path, caplog):
    cfg = make_cfg("trainer.max_steps=1", "trainer.save_every=0")
    final = run_stage(cfg)
    stamp = (final / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert run_stage(make_cfg("trainer.max_steps=1", "trainer.save_every=0", "trainer.workers=1")) == final
    assert "is finished" in caplog.text
    assert (final / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"^trainer\.output_dir: .* trainer\.max_steps \(1 before, 2 now\)"):
        run_stage(make_cfg("trainer.max_steps=2", "trainer.save_every=0"))
    with pytest.raises(ConfigError, match=r"^trainer\.resume: never, but .*run already holds a run"):
        run_stage(make_cfg("trainer.max_steps=1", "trainer.save_every=0", "trainer.resume=never"))


def test_the_finished_model_loads_and_starts_the_next_stage(make_cfg, tmp_path):
    dense = [
        *("model.reducer.split=none", "model.reducer.local_keep=null", "model.reducer.summary=none"),
        *("model.reducer.last_local_ffn=false", "plan.method=dense", "stage.template=plain", "stage.lr.reducer=null"),
        *("model.connector.windows=[4,2]", "model.connector.queries=[2,4]", "model.vision.image_size=16"),
    ]
    short = ["trainer.max_steps=1", "trainer.save_every=1"]
    # The plain template knows one question and one caption; every record of the fixture is of that form.
    first = run_stage(make_cfg(*dense, *short))
    loaded = SkipVisionForConditionalGeneration.from_pretrained(first)
    weights = load_file(first / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())

    for start in (first, tmp_path / "run" / "checkpoint-1"):
        cfg = make_cfg(
            *short,
            *(f"stage.start_from={start}", f"trainer.output_dir={tmp_path / start.name}_sft"),
            *("model.from_scratch=false", "model.tokenizer=null"),
        )
        second = run_stage(cfg)
        model = SkipVisionForConditionalGeneration.from_pretrained(second)
        assert model.plan.layers_without_ffn() == (0, 1)
        assert model.config.image_token_kinds().count(TokenKind.SKIPPED) == 5
        model, report = start_stage(second, model.config)
        assert not report.missing
        assert not report.unused


def test_full_disk(make_cfg, tmp_path):
    """A real failed write: files of this process may not grow beyond a limit."""
    cfg = make_cfg("trainer.max_steps=3", "trainer.save_every=1", "trainer.keep_checkpoints=0")

    class LimitAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"run/checkpoint-2: cannot be written: .*File too large"):
            run_stage(cfg, (LimitAt(),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [step for step, _ in all_checkpoints(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "model").exists()
    run_stage(cfg)
    assert [row["step"] for row in metrics(cfg)] == [1, 2, 3]


def test_full_disk_at_the_very_end(make_cfg, tmp_path, monkeypatch):
    from skipvision_train.training.trainer import StageTrainer

    original = StageTrainer.save_model

    def limited(self, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            return original(self, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = make_cfg("trainer.max_steps=1", "trainer.save_every=0")
    monkeypatch.setattr(StageTrainer, "save_model", limited)
    with pytest.raises(CheckpointError, match=r"run/model\.partial: cannot be written"):
        run_stage(cfg)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "weights.json"
    }  # fmt: skip


def test_bf16(make_cfg):
    cfg = make_cfg("trainer.max_steps=1", "trainer.save_every=0", "trainer.precision=bf16")
    weights = load_file(run_stage(cfg) / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def copy_data(workspace, folder):
    """A private copy of the data, for tests that damage it."""
    import shutil

    shutil.copytree(workspace / "data", folder)
    return f"data.recipe={folder / 'recipe.yaml'}"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_message(make_cfg, workspace, tmp_path, workers):
    recipe = copy_data(workspace, tmp_path / "data")
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        run_stage(make_cfg(recipe, f"trainer.workers={workers}"))
    assert ".png" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_unusable_samples_are_left_out(make_cfg, workspace, tmp_path):
    """Every image is broken: most micro batches are empty, the two text-only records still train."""
    recipe = copy_data(workspace, tmp_path / "data")
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"no image")
    cfg = make_cfg(recipe, "data.on_error=skip", "trainer.max_steps=3", "trainer.save_every=0")
    run_stage(cfg)
    answers = ["red red red red red", "red"]  # a byte is a token; end-of-turn is supervised too
    assert sum(row["supervised_tokens"] for row in metrics(cfg)) == sum(len(answer) + 1 for answer in answers)


def test_unwritable_output(make_cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^trainer\.output_dir: .*file/run cannot be written"):
        run_stage(make_cfg(f"trainer.output_dir={tmp_path / 'file' / 'run'}"))


def test_vision_weights_of_another_activation(make_cfg, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    facts = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
        hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(facts).save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"^model\.vision\.quick_gelu: True, but the weights of .*clip need False"):
        assemble(make_cfg(f"model.vision_weights={tmp_path / 'clip'}"))


def test_tokenizer_without_the_image_token(make_cfg):
    with pytest.raises(ConfigError, match=r"^model\.image_token: the tokenizer has no token '<img>'"):
        assemble(make_cfg("model.image_token=<img>"))
    with pytest.raises(ConfigError, match=r"^model\.text\.vocab_size: 200 is less than the tokenizer's 262"):
        assemble(make_cfg("model.text.vocab_size=200"))


def test_images_are_what_the_fixture_says(workspace):
    records = json.loads((workspace / "data" / "data.json").read_text())
    assert sum("image" in record for record in records) == 10
    with Image.open(workspace / "data" / "images" / "0.png") as image:
        assert image.size == (30, 70)


def test_wandb_offline_keeps_the_run_on_disk(make_cfg):
    import wandb

    cfg = make_cfg("trainer.max_steps=2", "trainer.save_every=0", "trainer.wandb=offline")
    run_stage(cfg)
    wandb.teardown()  # waits for the process that writes the file
    (log,) = (Path(cfg.trainer.output_dir) / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    assert b"loss/tiny" in content
    assert b"lr/connector" in content


def test_a_packed_run_learns_from_every_record_once(make_cfg, tmp_path):
    """An epoch in packed rows has the supervised tokens of an epoch without, in fewer rows, with less padding."""
    rows = {}
    for name, changes in (("plain", ()), ("packed", ("data.pack=true", "data.pack_length=400"))):
        output = f"trainer.output_dir={tmp_path / name}"
        run_stage(make_cfg("trainer.max_steps=null", "trainer.epochs=1", "trainer.global_batch=2", output, *changes))
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    supervised = {name: sum(row["supervised_tokens"] for row in lines) for name, lines in rows.items()}
    assert supervised["packed"] >= supervised["plain"]  # the last step is filled up from the beginning
    assert len(rows["packed"]) < len(rows["plain"]) / 2
    assert all(0 <= row["padding"] < 1 for lines in rows.values() for row in lines)
    manifest = json.loads((tmp_path / "packed" / "data.json").read_text())
    assert manifest["records"] == 12
