"""What is handed to DeepSpeed and transformers, and the metrics file."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerControl, TrainerState

from skipvision_train.config.specs import DeepSpeedSpec, TrainerSpec
from skipvision_train.errors import ConfigError
from skipvision_train.training.arguments import training_arguments
from skipvision_train.training.batching import BatchArithmetic
from skipvision_train.training.callbacks import MetricsFile, read_metrics
from skipvision_train.training.deepspeed_config import render
from skipvision_train.training.run import prepare_environment


def test_zero2():
    config = render(DeepSpeedSpec(stage=2), TrainerSpec(per_device_batch=4, precision="bf16"), 3, 0.5)
    json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 2
    assert not any(key.startswith("stage3") for key in config["zero_optimization"])
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_zero3_gathers_on_save_and_offloads():
    spec = DeepSpeedSpec(stage=3, offload_param=True, offload_optimizer=True, extra={"wall_clock_breakdown": True})
    config = render(spec, TrainerSpec(precision="fp32"), 1, 1.0)
    zero = config["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert config["bf16"] == {"enabled": False}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.03, 5198, 156), (0.03, 10, 1), (0.0, 10, 0)])
def test_warmup(make_cfg, ratio, steps, warmup):
    cfg = make_cfg(f"stage.warmup_ratio={ratio}", f"trainer.max_steps={steps}")
    arguments = training_arguments(cfg, BatchArithmetic.of(cfg.trainer, 100, 1))
    assert arguments.warmup_steps == warmup
    assert arguments.max_steps == steps
    assert arguments.average_tokens_across_devices


@pytest.fixture
def four_gpus(monkeypatch):
    """As torch sees a machine with four; nothing is computed on them."""
    PartialState(cpu=True)  # before: it would ask the driver
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_without_a_launcher_takes_one_of_several_gpus(make_cfg, four_gpus, caplog):
    cfg = make_cfg("trainer.per_device_batch=2")
    arguments = training_arguments(cfg, BatchArithmetic.of(cfg.trainer, 100, 1))
    assert not arguments.use_cpu
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 2)
    assert "one of this machine's 4 GPUs" in caplog.text


def test_a_process_without_a_gpu_is_refused(make_cfg, four_gpus, monkeypatch):
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        prepare_environment(make_cfg())
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(
        ConfigError, match=r"^PROCESSES: process number 5 of this machine has no GPU: there are 4, .* PROCESSES=4$"
    ):
        prepare_environment(make_cfg())


def test_metrics_file_is_cut_back_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    callback, state = MetricsFile(path), TrainerState(global_step=2, is_world_process_zero=True)
    callback.on_train_begin(None, state, TrainerControl())
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    state.global_step = 3
    callback.on_log(None, state, TrainerControl(), logs={"loss": 0.5})
    callback.on_log(None, state, TrainerControl(), logs={"train_loss": 0.5})
    assert read_metrics(path)[-1] == {"step": 3, "loss": 0.5}


def test_only_the_first_process_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).on_log(None, TrainerState(is_world_process_zero=False), TrainerControl(), logs={"loss": 1.0})
    assert not path.exists()


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(path)
