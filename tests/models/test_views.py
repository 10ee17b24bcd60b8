"""Models in bf16 for an engine that would cast them: the same to the bit, on pages that all processes share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from skipvision_train.errors import CheckpointError
from skipvision_train.models.build import build_model, start_stage
from skipvision_train.models.connector_settings import MlpConfig, ResamplerConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig
from skipvision_train.models.weights import WeightFiles

VISION = {"patch_size": 4, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "depths": (1, 2)}
BF16 = torch.bfloat16


def write_llm(config, folder, dtype, form="sharded"):
    """A decoder whose fp64 and fp32 weights are no bf16 numbers."""
    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(config.text_config)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_()
    llm.to(dtype).save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def as_the_engine_does(model):
    """DeepSpeed's cast (``engine._cast_module_mixed_precision``): every parameter, no buffer."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)
    return model


def check_same(load):
    """``load`` in bf16, and in fp32 followed by the engine's cast: one model, and random numbers go on alike."""
    results = []
    for dtype in (BF16, torch.float32):
        torch.manual_seed(3)
        model, report = load(dtype)
        results.append((model, report, torch.get_rng_state()))
    (ours, our_report, our_state), (theirs, their_report, their_state) = results
    as_the_engine_does(theirs)
    assert our_report == their_report
    assert torch.equal(our_state, their_state)
    named = dict(theirs.named_parameters(remove_duplicate=False))
    for name, parameter in ours.named_parameters(remove_duplicate=False):
        assert parameter.dtype == BF16, name
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.is_contiguous()
        assert torch.equal(parameter, named.pop(name)), name
    assert not named
    buffers = dict(theirs.named_buffers())
    assert any(name.endswith("inv_freq") for name in buffers)
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers.pop(name)), name
    assert not buffers
    return ours


def in_mappings(folder, *parameters):
    """Whether the tensors lie in private mappings of files below the folder."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith(str(folder)) and words[1] == "rw-p":
            ranges.append(tuple(int(end, 16) for end in words[0].split("-")))
    starts = [parameter.data_ptr() for parameter in parameters]
    return [any(a <= start < b for a, b in ranges) for start in starts]


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from Linux's /proc")


@pytest.mark.parametrize("form", ["sharded", "single", "bin"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float64])
def test_parts_are_those_of_fp32_rounded(tiny_config, tmp_path, dtype, form):
    llm = write_llm(tiny_config, tmp_path / "llm", dtype, form)
    model = check_same(lambda kind: build_model(tiny_config, llm=llm, dtype=kind))
    ids = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(4))
    expected = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    as_the_engine_does(expected)
    with torch.no_grad():
        assert torch.equal(model.language_model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_tower_and_projector_are_those_of_fp32_rounded(config_factory, tmp_path, dtype):
    """At twice the resolution of the files, so that positions are interpolated before they are rounded."""
    config = config_factory(
        vision=VisionConfig(image_size=32, **VISION | {"depths": (2,)}),
        connector=MlpConfig(),
        reducer=ReducerConfig.off(),
    )
    torch.manual_seed(2)
    tower = VisionTransformer(image_size=16, patch_size=4, width=32, layers=3, heads=2, mlp_ratio=2.0).to(dtype)
    (tmp_path / "clip").mkdir()
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(state, tmp_path / "clip" / "open_clip_model.safetensors")
    facts = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16, "mlp_ratio": 2.0}
    described = {"model_cfg": {"vision_cfg": facts, "quick_gelu": True}}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(described))
    shapes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {f"mm_projector.{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    torch.save(projector, tmp_path / "mm_projector.bin")
    check_same(
        lambda kind: build_model(config, vision=tmp_path / "clip", connector=tmp_path / "mm_projector.bin", dtype=kind)
    )


def test_without_files_a_model_is_rounded_too(tiny_config):
    check_same(lambda kind: build_model(tiny_config, dtype=kind))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("grown", [False, True])
def test_a_stage_is_that_of_fp32_rounded(config_factory, tmp_path, dtype, grown):
    """Grown: the resampler scaled, the position embedding interpolated, a reducer that starts fresh."""
    old = config_factory()
    if grown:
        old = config_factory(
            vision=VisionConfig(image_size=16, **VISION),
            connector=ResamplerConfig(windows=(4, 2), queries=(2, 4), head_dim=16),
            reducer=ReducerConfig.off(),
        )
    torch.manual_seed(0)
    SkipVisionForConditionalGeneration(old).to(dtype).save_pretrained(tmp_path / "stage", max_shard_size="30KB")
    new = config_factory()
    model = check_same(lambda kind: start_stage(tmp_path / "stage", new, kind))
    missing = {name for name, _ in model.named_parameters() if name.startswith("reducer.")}
    assert missing


@pytest.mark.parametrize("stored", ["original", "copy"])
def test_tied_embeddings_stay_one_parameter(config_factory, text_config_factory, tmp_path, stored):
    text = text_config_factory()
    text.tie_word_embeddings = True
    config = config_factory(text_config=text)
    llm = write_llm(config, tmp_path / "llm", BF16, "single")
    if stored == "copy":
        state = load_file(llm / "model.safetensors")
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        save_file(state, llm / "model.safetensors")
    model = check_same(lambda kind: build_model(config, llm=llm, dtype=kind))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "stage")
    again = check_same(lambda kind: start_stage(tmp_path / "stage", config, kind))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_tied_tensors_that_differ_by_less_than_bf16_are_refused_as_in_fp32(
    config_factory, text_config_factory, tmp_path
):
    text = text_config_factory()
    text.tie_word_embeddings = True
    config = config_factory(text_config=text)
    llm = write_llm(config, tmp_path / "llm", torch.float32, "single")
    state = load_file(llm / "model.safetensors")
    state["model.embed_tokens.weight"][0, 0] = 1.0
    head = state["model.embed_tokens.weight"].clone()
    head[0, 0] += 2**-20
    save_file(state | {"lm_head.weight": head}, llm / "model.safetensors")
    for dtype in (torch.float32, BF16):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            build_model(config, llm=llm, dtype=dtype)


def test_an_incomplete_file_is_refused_as_in_fp32(tiny_config, tmp_path):
    llm = write_llm(tiny_config, tmp_path / "llm", BF16, "single")
    state = load_file(llm / "model.safetensors")
    state["model.norm.weight"] = torch.ones(31, dtype=BF16)
    save_file(state, llm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(31,\), the model needs \(32,\)"):
        build_model(tiny_config, llm=llm, dtype=BF16)
    del state["model.norm.weight"]
    save_file(state, llm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*model\.norm\.weight"):
        build_model(tiny_config, llm=llm, dtype=BF16)


@linux
@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_what_a_file_holds_in_bf16_stays_in_it(tiny_config, tmp_path, form):
    llm = write_llm(tiny_config, tmp_path / "llm", BF16, form)
    model, _ = build_model(tiny_config, llm=llm, dtype=BF16)
    decoder = list(model.language_model.parameters())
    assert all(in_mappings(tmp_path, *decoder))
    assert not any(in_mappings(tmp_path, *model.connector.parameters()))
    model.save_pretrained(tmp_path / "stage")
    again, _ = start_stage(tmp_path / "stage", tiny_config, BF16)
    where = {name: in_mappings(tmp_path / "stage", p)[0] for name, p in again.named_parameters()}
    own = ("connector.", "vision_tower.positional_embedding")
    assert where == {name: not name.startswith(own) for name in where}


@linux
def test_other_types_and_fp32_models_do_not_depend_on_the_file(tiny_config, tmp_path):
    llm = write_llm(tiny_config, tmp_path / "llm", torch.float32)
    for dtype in (BF16, torch.float32):
        model, _ = build_model(tiny_config, llm=llm, dtype=dtype)
        assert not any(in_mappings(tmp_path, *model.parameters()))


@linux
def test_writing_changes_neither_the_file_nor_another_model(tiny_config, tmp_path):
    llm = write_llm(tiny_config, tmp_path / "llm", BF16, "single")
    content = (llm / "model.safetensors").read_bytes()
    (one, _), (other, _) = (build_model(tiny_config, llm=llm, dtype=BF16) for _ in range(2))
    before = [parameter.detach().clone() for parameter in other.language_model.parameters()]
    with torch.no_grad():
        for parameter in one.language_model.parameters():
            parameter.fill_(7.0)
    assert (llm / "model.safetensors").read_bytes() == content
    assert all(torch.equal(a, b) for a, b in zip(before, other.language_model.parameters(), strict=True))


@linux
@pytest.mark.parametrize("how", ["removed", "saved anew"])
def test_a_model_outlives_its_files(tiny_config, tmp_path, how):
    """What a run folder sees when a stage is trained again while the next one has its model open."""
    torch.manual_seed(0)
    old = SkipVisionForConditionalGeneration(tiny_config).to(BF16)
    old.save_pretrained(tmp_path / "model")
    model, _ = start_stage(tmp_path / "model", tiny_config, BF16)
    if how == "removed":
        shutil.rmtree(tmp_path / "model")
    else:
        small = SkipVisionForConditionalGeneration(tiny_config).to(BF16)
        small.language_model.lm_head = torch.nn.Linear(1, 1)  # shorter than what it replaces
        small.save_pretrained(tmp_path / "model")
    expected = old.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_parameters_from_one_stored_tensor_are_two(config_factory, tmp_path):
    """One scorer for both summary tokens becomes two, which train apart."""
    SkipVisionForConditionalGeneration(config_factory(reducer=ReducerConfig(local_keep=6))).to(BF16).save_pretrained(
        tmp_path / "stage"
    )
    config = config_factory(reducer=ReducerConfig(local_keep=6, summary="both", summary_layers="separate"))
    model = check_same(lambda kind: start_stage(tmp_path / "stage", config, kind))
    one, two = model.reducer.summary, model.reducer.latter_summary
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b)
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


def test_tensors_of_a_pickle_that_lie_in_one_another_come_apart(tmp_path):
    flat = torch.arange(12, dtype=BF16)
    torch.save(
        {"a": flat[:6].view(2, 3), "b": flat[6:], "c": flat, "d": flat, "t": flat[:6].view(2, 3).t()},
        tmp_path / "w.bin",
    )
    views = WeightFiles.open(tmp_path / "w.bin").views({name: "a" if name == "e" else name for name in "abcdet"}, BF16)
    assert {name: value.tolist() for name, value in views.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]], "b": [6, 7, 8, 9, 10, 11], "c": list(range(12)), "d": list(range(12)),
        "e": [[0, 1, 2], [3, 4, 5]], "t": [[0, 3], [1, 4], [2, 5]],
    }  # fmt: skip
    assert all(value.is_contiguous() for value in views.values())
    storages = [value.untyped_storage() for value in views.values()]
    assert len({storage.data_ptr() for storage in storages}) == 6
    assert [storage.nbytes() for storage in storages] == [12, 12, 24, 24, 12, 12]


def test_a_view_is_saved_by_itself(tiny_config, tmp_path):
    """torch saves whole storages, and both know tensors by them: a parameter must not bring its file along."""
    llm = write_llm(tiny_config, tmp_path / "llm", BF16, "single")
    model, _ = build_model(tiny_config, llm=llm, dtype=BF16)
    weight = model.language_model.model.norm.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes
    model.language_model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", llm))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    written, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", llm))
    assert written["dtype"] == before["dtype"] == "bfloat16"
