from __future__ import annotations

import io
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interrupted import InterruptAfter, InterruptionError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_flops import total
from transformers import TrainerState, set_seed

from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.data.processor import Example
from skipvision_train.errors import TrainingError
from skipvision_train.plans import fastv
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.rules import TokenKind
from skipvision_train.training.batching import EpochSampler, TrainCollator
from skipvision_train.training.callbacks import MetricsFile, read_metrics
from skipvision_train.training.clock import StepClock
from skipvision_train.training.facts import FACTS, BatchFacts, FactsCollator, batch_facts
from skipvision_train.training.metrics import Meter, PartNorms, share_norm, time_logs
from skipvision_train.training.reporting import Progress, remaining, wandb_mode, wandb_run_id
from skipvision_train.training.run import assemble, run_stage
from skipvision_train.training.stages import PARTS
from skipvision_train.training.work import WorkCounter, peak_tflops


def lines_of(cfg):
    return read_metrics(Path(cfg.trainer.output_dir) / "metrics.jsonl")


def own_first_step(cfg):
    """The first step again, sample by sample: the loss of every source, gradients, tokens."""
    set_seed(cfg.trainer.seed)
    parts = assemble(cfg)
    parts.model.train()
    sums, tokens, kinds = Counter(), Counter(), Counter()
    order = list(EpochSampler(len(parts.records), cfg.trainer.global_batch, cfg.trainer.seed))
    for index in order[: cfg.trainer.global_batch]:
        source = parts.records[index].source
        batch = parts.collator([parts.feed.dataset[index]])
        labels = batch.pop("labels")[0, 1:]
        loss = F.cross_entropy(parts.model(**batch).logits[0, :-1], labels, ignore_index=-100, reduction="sum")
        loss.backward()
        sums[source] += loss.item()
        tokens[source] += int((labels != -100).sum())
        kinds.update(batch["token_kinds"].flatten().tolist())
    norms = {}
    for part, module in PARTS.items():
        squares = [p.grad.square().sum() for p in parts.model.get_submodule(module).parameters() if p.grad is not None]
        if squares:
            norms[part] = torch.stack(squares).sum().sqrt().item() / sum(tokens.values())
    return parts, sums, tokens, kinds, norms


@pytest.fixture
def two_sources(workspace, tmp_path):
    """The twelve records as two sources."""
    records = json.loads((workspace / "data" / "data.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(records[:5]))
    (tmp_path / "b.json").write_text(json.dumps(records[5:]))
    images = str(workspace / "data" / "images")
    sources = [{"name": name, "path": f"{name}.json", "image_root": images} for name in ("a", "b")]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"sources": sources}))
    return f"data.recipe={tmp_path / 'recipe.yaml'}"


@pytest.mark.parametrize("changes", [(), ("trainer.per_device_batch=1",)])
def test_the_groups_of_a_line_against_an_own_computation(make_cfg, two_sources, changes):
    cfg = make_cfg(two_sources, "trainer.max_steps=1", "trainer.save_every=0", "trainer.peak_tflops=0.001", *changes)
    parts, sums, tokens, kinds, norms = own_first_step(cfg)
    run_stage(cfg)
    (row,) = lines_of(cfg)
    found = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
    # fp32 sums in another order.
    assert found == pytest.approx({name: sums[name] / tokens[name] for name in sums}, rel=1e-5)
    assert row["loss"] == pytest.approx(sum(sums.values()) / sum(tokens.values()), rel=1e-5)
    assert {part: row[f"grad_norm/{part}"] for part in norms} == pytest.approx(norms, rel=1e-4)
    assert sum(row[f"grad_norm/{part}"] ** 2 for part in norms) == pytest.approx(row["grad_norm"] ** 2, rel=1e-5)
    assert row["tokens/text"] == kinds[TokenKind.TEXT]
    assert row["tokens/visual"] == sum(n for kind, n in kinds.items() if kind not in (TokenKind.TEXT, TokenKind.PAD))
    assert row["tokens/supervised"] == sum(tokens.values())
    skipping = sum(bool(rule.no_ffn) for rule in parts.model.plan.rules) / parts.model.plan.num_layers
    assert row["tokens/ffn_skipped"] == skipping * kinds[TokenKind.SKIPPED] > 0
    assert 0 < row["mfu"] < row["mfu_dense"]
    assert sum(
        row[f"time/{phase}"] for phase in ("data", "forward", "backward", "optimizer", "other")
    ) == pytest.approx(1, abs=1e-3)
    assert min(row[f"time/{phase}"] for phase in ("forward", "backward", "optimizer")) > 0
    assert row["memory/peak_rss_gb"] > 0.05


def test_facts_of_a_packed_batch(make_cfg, two_sources):
    """Two samples of a row from two sources, one left out; against the batch's own tensors."""
    parts = assemble(make_cfg(two_sources, "data.pack=true", "data.pack_length=400"))
    rows = [parts.feed.dataset[i] for i in range(parts.feed.rows)]
    rows[0] = [None, *rows[0][1:]]
    batch = FactsCollator(parts.collator, ["a", "b"])(rows)
    facts = batch.pop(FACTS)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}  # what a GPU reads
    batch = parts.collator(rows)
    mask = batch["labels"][:, 1:] != -100
    assert facts.supervised == int(mask.sum()) == int(facts.layout.read.sum())
    assert torch.equal(facts.layout.kinds, batch["token_kinds"])
    assert torch.equal(facts.layout.document_ids, batch["document_ids"])
    kinds = torch.bincount(batch["token_kinds"].flatten(), minlength=6)
    kinds[TokenKind.PAD] = 0
    assert facts.kinds.sum(0).tolist() == kinds.tolist()
    samples = [s for row in rows for s in row if s is not None]
    assert facts.samples == tuple(f"{s.record} of {s.source}" for s in samples)
    # Which document each supervised position is of, counted over the batch.
    documents = batch["document_ids"]
    offsets = np.cumsum([0, *(documents.max(1).values + 1).tolist()])[:-1]
    of_position = (documents + torch.tensor(offsets)[:, None])[:, 1:][mask]
    assert facts.sources.tolist() == ["ab".index(samples[d].source) for d in of_position.tolist()]


def test_facts_by_hand():
    """The first label of a sample is predicted by nothing."""
    text = [TokenKind.TEXT] * 3
    one = Example([5, 6, 7], [5, -100, 7], text, None, (2,), "0", "b")
    other = Example([5, 6, 7], [-100, 6, 7], text, None, (3, 1), "1", "a")
    facts = batch_facts([one, other], ["a", "b"], TokenLayout.from_kinds(torch.zeros(2, 4)))
    assert facts.sources.tolist() == [1, 0, 0]
    assert (facts.samples, facts.tiles, facts.places) == (("0 of b", "1 of a"), (2, 3, 1), 8)


def test_an_empty_batch_has_facts():
    facts = FactsCollator(TrainCollator(7), ["a"])([None])[FACTS]
    assert (facts.samples, facts.supervised, facts.kinds.shape, facts.places) == ((), 0, (0, 6), 2)


@pytest.mark.parametrize("llm", [5e-3, None])
def test_work_of_dense_training_against_torchs_counter(make_cfg, llm):
    """Matrix products that torch counts in a forward and a backward pass of the decoder and the head."""
    cfg = make_cfg("plan.method=dense", f"stage.lr.llm={'null' if llm is None else llm}")
    parts = assemble(cfg)
    sample = parts.feed.dataset[0]
    counter = WorkCounter(parts.model.config, [part for part, rate in vars(cfg.stage.lr).items() if rate is not None])
    kinds = tuple(np.bincount(sample.token_kinds, minlength=6).tolist())
    length = len(sample.input_ids)
    expected = counter.sample(kinds, parts.model.plan).flops + counter.around((), length)
    embeds = torch.randn(1, length, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # not all kernels are counted
        parts.model.language_model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    assert total(counted) == expected
    assert counter.sample(kinds, parts.model.plan).ffn_skipped == 0


def test_ranking_what_is_dropped_has_no_backward_pass(tiny_config):
    plan, kinds = fastv(1, 0.5).bind(3), (0, 9, 12, 0, 20, 0)
    counts = {TokenKind(kind): number for kind, number in enumerate(kinds) if number}
    costs = sequence_flops(tiny_config.text_config, counts, plan)
    ranking = costs.raters + sum(layer.score for layer in costs.layers)
    once, whole = (WorkCounter(tiny_config, parts).sample(kinds, plan).flops for parts in ((), ("llm",)))
    assert 0 < ranking < once == pytest.approx(costs.total)
    assert whole == pytest.approx(3 * (once - ranking) + ranking)


def test_a_language_model_with_adapters_costs_what_a_frozen_one_does(make_cfg):
    """Its weights get no gradient, the connector in front of it still does."""
    cfg = make_cfg("plan.method=skip_ffn")
    parts = assemble(cfg)
    names = ["connector", "llm"]
    adapted, frozen = (
        WorkCounter(parts.model.config, names, has_adapters=True),
        WorkCounter(parts.model.config, names[:1]),
    )
    whole = WorkCounter(parts.model.config, names)
    kinds = tuple(np.bincount(parts.feed.dataset[0].token_kinds, minlength=6).tolist())
    costs = [counter.sample(kinds, parts.model.plan).flops for counter in (adapted, frozen, whole)]
    assert costs[0] == costs[1] < costs[2]
    assert adapted.around((1,), 3) == frozen.around((1,), 3) < whole.around((1,), 3)


def test_losses_of_a_skipped_step_do_not_count(tiny_config):
    meter = Meter(WorkCounter(tiny_config, ["llm"]), ["a", "b"], ["llm"], torch.device("cpu"))
    kinds, layout = np.zeros((1, len(TokenKind)), np.int64), TokenLayout.from_kinds(torch.zeros(1, 4))
    facts = BatchFacts(("0 of a",), np.array([0, 0, 1]), kinds, (), layout)
    for losses, skipped in (([1.0, 2.0, 3.0], False), ([100.0] * 3, True), ([5.0, 6.0, 7.0], False)):
        meter.add_losses(torch.tensor(losses), facts)
        meter.end_step(skipped)
    logs = meter.read(lambda row: row[None]).logs(3)
    assert (logs["loss/a"], logs["loss/b"]) == ((1 + 2 + 5 + 6) / 4, (3 + 7) / 2)


def test_norms_are_those_since_the_last_reading():
    tensors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [t], "name": n} for t, n in zip(tensors, ("a", "a", "b"), strict=True)])
    norms, device = PartNorms(), torch.device("cpu")
    optimizer.register_step_pre_hook(norms.hook)
    for due, expected in ((False, [0, 0]), (True, [4, 9 + 16]), (False, [0, 0])):
        norms.due = due
        for tensor, gradient in zip(tensors, (3.0, 4.0, 2.0), strict=True):
            tensor.grad = torch.tensor([gradient])
        optimizer.step()
        assert norms.take(["b", "a"], device).tolist() == expected


def test_peaks_of_known_devices():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bf16") == 312.0
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_tflops("Some other", "bf16") is None


def test_the_clock_adds_up_phases():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 11.0, 20.0])
    clock = StepClock(now=lambda: next(times))
    for phase in ("data", "forward", "backward"):
        clock.mark(phase)
    spent = clock.read()
    assert {phase: value for phase, value in spent.items() if value} == {
        "other": 1,
        "data": 2,
        "forward": 3,
        "backward": 4,
    }
    clock.mark("save")
    assert clock.read()["backward"] == 1
    logs = time_logs({**spent, "save": 100.0, "samples": 50.0}, steps=2)
    assert logs["time/step"] == 5
    assert logs["time/forward"] == 0.3


def test_shares_of_a_norm():
    assert share_norm([9.0, 16.0], 10.0) == pytest.approx([6.0, 8.0])
    assert share_norm([0.0, 0.0], 1.0) == []
    assert share_norm([1.0], float("nan")) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(progress):
    state = TrainerState(max_steps=10, global_step=3, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    for step in (4, 5):
        state.global_step = step
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, logs={"loss": 2.5})
    progress.on_train_end(None, state, None)


def test_a_log_file_has_a_plain_line_per_logged_step(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO):
        show(Progress(True, stream))
    assert stream.getvalue() == ""
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith(f"step {n}/10, loss 2.5000") for n, line in zip((4, 5), lines, strict=True)] == [True, True]
    assert remaining(30.0, 3, 10) == "0:01:40"
    assert remaining(1.0, 0, 10) == "?"


def test_a_disk_that_is_full_is_one_clear_error():
    state = TrainerState(global_step=3)
    state.is_world_process_zero = True
    with pytest.raises(TrainingError, match=r"^/dev/full: cannot be written: No space left on device$"):
        MetricsFile(Path("/dev/full")).on_line(state, {"loss": 1.0})


def test_a_terminal_has_a_bar_and_no_lines(caplog):
    stream = Terminal()
    with caplog.at_level(logging.INFO):
        show(Progress(True, stream))
    assert "3/10" in stream.getvalue()  # where the run continues
    assert "5/10" in stream.getvalue()
    assert "loss 2.5" in stream.getvalue()
    assert not caplog.records


def test_tensorboard_goes_on_where_the_run_does(make_cfg):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = make_cfg("trainer.tensorboard=true", "trainer.save_every=2")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(3),))
    run_stage(cfg)
    events = EventAccumulator(str(Path(cfg.trainer.output_dir) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/tiny")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in lines_of(cfg)])


def test_wandb_without_a_key_is_offline_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("online") == "offline"
    assert "there is no key" in caplog.text
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("online") == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode("online") == "online"


def test_every_start_of_a_run_has_one_wandb_id(tmp_path):
    first = wandb_run_id(tmp_path)
    assert wandb_run_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert wandb_run_id(tmp_path / "other") != first


def test_answers_are_written_and_change_nothing(make_cfg, tmp_path):
    plain = make_cfg("trainer.save_every=0", f"trainer.output_dir={tmp_path / 'plain'}")
    run_stage(plain)
    watch = ("trainer.watch.sample_every=3", "trainer.watch.sample_count=2", "trainer.watch.sample_tokens=5")
    cfg = make_cfg("trainer.save_every=0", *watch)
    run_stage(cfg)
    assert [row["loss"] for row in lines_of(cfg)] == [row["loss"] for row in lines_of(plain)]
    rows = [json.loads(line) for line in (Path(cfg.trainer.output_dir) / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["record"]) for row in rows] == [(step, f"{i} of tiny") for step in (3, 4) for i in (0, 6)]
    assert rows[0]["answer"].strip() == "red"
    assert all(0 < len(row["prediction"].encode()) <= 20 for row in rows if row["prediction"])
