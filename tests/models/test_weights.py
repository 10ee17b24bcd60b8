"""Files of weights: what they hold is known first, then one tensor at a time is read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from skipvision_train.errors import CheckpointError
from skipvision_train.models import weights as module
from skipvision_train.models.build import build_model, start_stage
from skipvision_train.models.weights import FLOATS, WeightFiles, read_json

MEGABYTE = 1 << 20


def write_shards(folder: Path, state: dict, form: str = "safetensors") -> Path:
    """Two shards and their index; returns the index."""
    names = {name: f"model-0000{i % 2 + 1}-of-00002.{form}" for i, name in enumerate(state)}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in state.items() if names[name] == file}
        if form == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    stem = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return index


def some_state() -> dict:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).to(torch.bfloat16),
        "c": torch.randn(2, 2).half(),
        "d.e": torch.randn(()).double(),
        "ids": torch.arange(7),
    }


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin", "shards", "bin shards", "one file", "legacy.bin"])
def stored(request, tmp_path):
    """The same tensors in every form."""
    state, form = some_state(), request.param
    if "shards" in form:
        write_shards(tmp_path, state, "bin" if form.startswith("bin") else "safetensors")
        return WeightFiles.open(tmp_path), state
    if form == "one file":
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "epoch_3.pt")
        return WeightFiles.open(tmp_path / "epoch_3.pt"), state
    if form == "legacy.bin":
        torch.save(state, tmp_path / form, _use_new_zipfile_serialization=False)
        return WeightFiles.open(tmp_path / form), state
    (save_file if form.endswith("safetensors") else torch.save)(state, tmp_path / form)
    return WeightFiles.open(tmp_path), state


def test_what_the_files_hold_is_known_before_they_are_read(stored):
    weights = stored[0]
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.tensors.items()}
    assert found == {
        "a": ((3, 4), "float32"),
        "b": ((5,), "bfloat16"),
        "c": ((2, 2), "float16"),
        "d.e": ((), "float64"),
        "ids": ((7,), found["ids"][1]),
    }
    assert found["ids"][1] in ("I64", "int64")


def test_tensors_are_read_as_stored_and_copied_as_fp32(stored):
    weights, state = stored
    floats = [name for name in state if name != "ids"]
    for name, tensor in weights.read(floats).items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    own = {name: torch.full(state[name].shape, torch.nan) for name in floats}
    again = torch.zeros(3, 4)
    weights.copy([*own.items(), ("a", again)], "the model")
    assert torch.equal(again, state["a"])
    for name in floats:
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], state[name].float())


def test_without_contents_tensors_have_shape_and_type_alone(stored, reads):
    weights, state = stored
    for name, tensor in replace(weights, contents=False).read(["a", "b", "c", "d.e"]).items():
        assert (tensor.device.type, tensor.shape, tensor.dtype) == ("meta", state[name].shape, state[name].dtype)
    assert reads == []


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_told(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=rf"{name}: a git-lfs pointer, .*; run `git lfs pull` in its repository$"):
        WeightFiles.open(tmp_path)
    if name.endswith(".json"):
        with pytest.raises(CheckpointError, match=r"git lfs pull"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("x", (2, 3)), ("y", (4,))], r"the part lacks 2 of 3 tensors, first x of shape \(2, 3\)$"),
        ([("c", (2, 3))], r": c has shape \(2, 2\), the model needs \(2, 3\)$"),
        (
            [("ids", (7,))],
            r": ids has dtype (I64|int64); quantised weights cannot be loaded, use one of float64, float32",
        ),
    ],
)
def test_nothing_is_copied_if_one_tensor_does_not_fit(stored, pairs, message):
    weights, _ = stored
    first = torch.full((3, 4), 7.0)
    wanted = [("a", first), *((name, torch.zeros(shape)) for name, shape in pairs)]
    with pytest.raises(CheckpointError, match=message) as caught:
        weights.copy(wanted, "the part")
    assert "\n" not in str(caught.value)
    assert torch.equal(first, torch.full((3, 4), 7.0))


def test_integers_are_not_read(stored):
    with pytest.raises(CheckpointError, match="ids has dtype"):
        stored[0].read(["ids"])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8", "bool"])
def test_quantised_weights_are_refused(tmp_path, dtype):
    save_file({"w": torch.zeros(4).to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"dtype .*use one of {', '.join(FLOATS)}"):
        WeightFiles.open(tmp_path).copy([("w", torch.zeros(4))], "the model")


def test_the_first_form_that_exists_counts(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no weights; found none of model\.safetensors, model\.safetensors\.index"
    ):
        WeightFiles.open(tmp_path)
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(WeightFiles.open(tmp_path).tensors) == {"old"}
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(WeightFiles.open(tmp_path).tensors) == {"new"}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_incomplete_checkpoints_are_named(tmp_path, form):
    index = write_shards(tmp_path, some_state(), form)
    content = json.loads(index.read_text())
    shard = tmp_path / content["weight_map"]["a"]
    whole = shard.read_bytes()

    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "lost": shard.name}}))
    with pytest.raises(CheckpointError, match=rf"index\.json: lost is listed in {shard.name}, but that file does not"):
        WeightFiles.open(tmp_path)
    index.write_text(json.dumps(content))
    shard.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: damaged or truncated"):
        WeightFiles.open(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: lists {shard.name}, which is not there; .* incomplete"):
        WeightFiles.open(tmp_path)
    for broken in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="weight_map must name a file for every tensor"):
            WeightFiles.open(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="no readable JSON"):
        WeightFiles.open(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        read_json(index)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_cut_files_are_one_clear_line(tmp_path, form, kept):
    file = tmp_path / form
    if form.endswith("safetensors"):
        save_file(some_state(), file)
    else:
        torch.save(some_state(), file, _use_new_zipfile_serialization=form != "legacy.bin")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{form}: (damaged or truncated|no plain file of tensors)") as caught:
        WeightFiles.open(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_does_not_run(tmp_path, form):
    marker, file = tmp_path / "ran", tmp_path / "pytorch_model.bin"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"w": Payload()}, protocol=2))
    else:
        torch.save({"w": Payload()}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: no plain file of tensors: .* never loaded"
    ) as caught:
        WeightFiles.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_other_values_than_tensors_are_refused(tmp_path):
    for content in ({"w": torch.ones(1), "step": 3}, [torch.ones(1)], torch.ones(1)):
        torch.save(content, tmp_path / "x.bin")
        with pytest.raises(CheckpointError, match=r"x\.bin: expected a dict of tensors"):
            WeightFiles.open(tmp_path / "x.bin")


@pytest.fixture
def reads(monkeypatch):
    """Record every stored tensor that is read: its name, and whether the one before was still alive."""
    record: list[tuple[str, bool]] = []
    alive: list[weakref.ref] = []
    reader = module._reader

    @contextmanager
    def watched(file, backend):
        with reader(file, backend) as read:

            def watch(name):
                held = any(ref() is not None for ref in alive)
                tensor = read(name)
                alive[:] = [weakref.ref(tensor)]
                record.append((name, held))
                return tensor

            yield watch

    monkeypatch.setattr(module, "_reader", watched)
    return record


def test_one_stored_tensor_at_a_time(tiny_config, tmp_path, reads):
    llm = AutoModelForCausalLM.from_config(tiny_config.text_config)
    llm.save_pretrained(tmp_path / "llm", max_shard_size="20KB")
    model, _ = build_model(tiny_config, llm=tmp_path / "llm")
    assert sorted(reads) == sorted((name, False) for name in llm.state_dict())
    model.save_pretrained(tmp_path / "stage", max_shard_size="20KB")
    reads.clear()
    start_stage(tmp_path / "stage", tiny_config)
    language = [(name, held) for name, held in reads if name.startswith("language_model.")]
    assert sorted(language) == sorted((f"language_model.{name}", False) for name in llm.state_dict())
    # The connector may change its shape: it is read as a whole, and gone before anything else is read.
    assert {name.split(".")[0] for name, held in reads if held} == {"connector"}


MEASURE = """
import ctypes, sys
from pathlib import Path
from skipvision_train.models.build import build_model, start_stage
from skipvision_train.models.configuration import SkipVisionConfig

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

folder = Path(sys.argv[1])
config = SkipVisionConfig.from_pretrained(folder / "small")
build_model(config), start_stage(folder / "small", config)  # what first use imports and keeps
config = SkipVisionConfig.from_pretrained(folder / "stage")
for build in (lambda: build_model(config, llm=folder / "llm"), lambda: start_stage(folder / "stage", config)):
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model, _ = build()
    peak = memory("VmHWM") - before
    print(peak, sum(p.numel() * 4 for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_model_is_held_once(config_factory, text_config_factory, tmp_path):
    """About 114 MB of fp32 in one file: with a second copy, or with the file mapped, the peak would be twice that."""
    config_factory().save_pretrained(tmp_path / "small")
    build_model(config_factory())[0].save_pretrained(tmp_path / "small")
    text = text_config_factory(num_hidden_layers=8, vocab_size=4096)
    text.hidden_size, text.intermediate_size = 512, 2048
    config = config_factory(text_config=text)
    model, _ = build_model(config)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 110 * MEGABYTE
    model.language_model.save_pretrained(tmp_path / "llm")
    model.save_pretrained(tmp_path / "stage")
    del model
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == 2
    for peak, weights in lines:
        assert weights == size
        # The peak is the model and one tensor, of at most 8 MB here, and what else the interpreter does.
        assert size - 8 * MEGABYTE < peak < 1.35 * size


def test_copies_of_parameters_are_leaves_that_train(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    parameter = nn.Parameter(torch.zeros(2))
    WeightFiles.open(tmp_path).copy([("w", parameter)], "the model")
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert torch.equal(parameter.data, torch.ones(2))
