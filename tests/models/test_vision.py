"""The vision tower against transformers' CLIP: same random weights, fp32, every depth.

Measured on those weights over ten seeds: hidden states of up to 10 in absolute value differ by at most 2.6e-6 (another
order of summation); the tolerance, 2e-5, is eight times that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.settings import VisionConfig
from skipvision_train.models.vision import (
    ClipVisionTower,
    load_vision_weights,
    read_vision_checkpoint,
    resize_position_embedding,
)

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
LAYERS = 3


def reference(activation: str, image_size: int = 16) -> CLIPVisionModel:
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            attn_implementation="eager",
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=4,
            hidden_act=activation,
        )
    ).eval()
    for parameter in model.parameters():  # the usual initialisation leaves biases at 0 and activations near linear
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def tower_of(model: CLIPVisionModel, folder: Path, readout: str = "none", **changes) -> ClipVisionTower:
    model.save_pretrained(folder)
    checkpoint = read_vision_checkpoint(folder)
    config = VisionConfig(**{**checkpoint.facts, "depths": tuple(range(LAYERS + 1)), **changes})
    tower = ClipVisionTower(config, readout).eval()
    load_vision_weights(tower, checkpoint)
    return tower


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_every_depth_equals_transformers(activation, tmp_path):
    model = reference(activation)
    tower = tower_of(model, tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states
        found = tower(pixels).states
    assert len(found) == len(expected) == LAYERS + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, 16, 16)
        torch.testing.assert_close(ours, theirs[:, 1:], **TOLERANCE)


def test_the_activation_matters(tmp_path):
    tower = tower_of(reference("quick_gelu"), tmp_path)
    wrong = ClipVisionTower(replace(tower.config, quick_gelu=False)).eval()
    wrong.load_state_dict(tower.state_dict())
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        difference = (tower(pixels).states[-1] - wrong(pixels).states[-1]).abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("size", [32, 8])
def test_another_resolution_equals_transformers(size, tmp_path):
    model = reference("quick_gelu")
    tower = tower_of(model, tmp_path, image_size=size)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        for ours, theirs in zip(tower(pixels).states, expected, strict=True):
            torch.testing.assert_close(ours, theirs[:, 1:], **TOLERANCE)


def test_resize_keeps_class_row_dtype_and_constants():
    embedding = torch.randn(17, 5, dtype=torch.bfloat16)
    resized = resize_position_embedding(embedding, 6)
    assert resized.shape == (37, 5)
    assert resized.dtype == torch.bfloat16
    torch.testing.assert_close(resized[0], embedding[0], rtol=0, atol=0)
    assert resize_position_embedding(embedding, 4) is embedding
    constant = torch.full((17, 5), 1.5)
    torch.testing.assert_close(resize_position_embedding(constant, 7), torch.full((50, 5), 1.5))


def test_resize_does_not_transpose_the_grid():
    column = torch.arange(4.0).repeat(4)  # value grows along a row of the raster
    embedding = torch.cat([torch.zeros(1), column])[:, None]
    rows = resize_position_embedding(embedding, 8)[1:].view(8, 8)
    assert (rows.diff(dim=1) > -0.2).all()
    torch.testing.assert_close(rows, rows[:1].expand(8, 8))


def test_resize_refuses_what_is_no_square():
    with pytest.raises(ValueError, match="12 rows"):
        resize_position_embedding(torch.randn(12, 4), 4)


def test_depths_are_returned_in_their_order_and_nothing_deeper_is_built(tmp_path):
    full = tower_of(reference("quick_gelu"), tmp_path)
    some = ClipVisionTower(replace(full.config, depths=(2, 0))).eval()
    names = set(some.state_dict())
    assert not any(name.startswith(("ln_post", "proj", "transformer.resblocks.2")) for name in names)
    some.load_state_dict({name: full.state_dict()[name] for name in names})
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        states, (two, zero) = full(pixels).states, some(pixels).states
    torch.testing.assert_close(two, states[2], rtol=0, atol=0)
    torch.testing.assert_close(zero, states[0], rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_gets_the_same_gradient_with_and_without_checkpointing(recompute, tmp_path):
    full = tower_of(reference("quick_gelu"), tmp_path)
    tower = ClipVisionTower(replace(full.config, depths=(1, 2))).train()
    tower.load_state_dict({name: full.state_dict()[name] for name in tower.state_dict()})
    tower.gradient_checkpointing = recompute
    saved = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = sum(state.square().mean() for state in tower(pixels).states)
    stored = sum(saved)
    loss.backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    plain = ClipVisionTower(tower.config).train()
    plain.load_state_dict(tower.state_dict())
    sum(state.square().mean() for state in plain(pixels).states).backward()
    for ours, theirs in zip(tower.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert stored < 10_000 if recompute else stored > 10_000


def eager_readout(model: CLIPVisionModel, pixels: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class attention summed over heads, and mean keys, of the block that puts out this depth."""
    taken, name = [], f"layers.{depth - 1}.self_attn.k_proj"
    (projection,) = (module for path, module in model.named_modules() if path.endswith(name))
    hook = projection.register_forward_hook(lambda *args: taken.append(args[2]))
    with torch.no_grad():
        maps = model(pixels, output_attentions=True).attentions
    hook.remove()
    return maps[depth - 1][:, :, 0, 1:].sum(1), taken[0][:, 1:].unflatten(-1, (2, 8)).mean(2)


@pytest.mark.parametrize("depths", [(2,), (1, 3), (3, 0, 1)])
def test_class_attention_and_keys_equal_transformers_eager(depths, tmp_path):
    model = reference("quick_gelu")
    tower = tower_of(model, tmp_path, "attention", depths=depths)
    pixels = torch.randn(3, 3, 16, 16)
    found = tower(pixels)
    saliency, keys = eager_readout(model, pixels, depths[-1])
    assert found.saliency.dtype == torch.float32
    torch.testing.assert_close(found.saliency, saliency, **TOLERANCE)
    torch.testing.assert_close(found.keys, keys, **TOLERANCE)
    assert saliency.std() > 1e-2  # attention is far from uniform, so the comparison says something


def test_the_layer_that_llava_reads_is_the_one_before_the_last(tmp_path):
    """``mm_vision_select_layer`` -2 with ``attentions[-2]``: the block whose output is ``hidden_states[-2]``."""
    model = reference("quick_gelu")
    tower = tower_of(model, tmp_path, "attention", depths=(LAYERS - 1,))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True, output_attentions=True)
        found = tower(pixels)
    torch.testing.assert_close(found.states[0], expected.hidden_states[-2][:, 1:], **TOLERANCE)
    torch.testing.assert_close(found.cls, expected.hidden_states[-2][:, 0], **TOLERANCE)
    torch.testing.assert_close(found.saliency, expected.attentions[-2][:, :, 0, 1:].sum(1), **TOLERANCE)


@pytest.mark.parametrize("depths", [(1, 2), (2, 0)])
def test_similarity_is_the_cosine_with_the_class_token(depths, tmp_path):
    model = reference("quick_gelu")
    tower = tower_of(model, tmp_path, "similarity", depths=depths)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        state = model(pixels, output_hidden_states=True).hidden_states[depths[-1]].double()
    found = tower(pixels)
    for image in range(2):
        for patch in range(16):
            one, other = state[image, 0], state[image, 1 + patch]
            expected = (one @ other / (one @ one).sqrt() / (other @ other).sqrt()).item()
            assert found.saliency[image, patch].item() == pytest.approx(expected, abs=1e-5)
    assert found.keys is None
    torch.testing.assert_close(found.cls, state[:, 0].float(), **TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
def test_reading_changes_no_state_and_nothing_is_read_unasked(training, tmp_path):
    model = reference("quick_gelu")
    pixels = torch.randn(2, 3, 16, 16)
    plain = tower_of(model, tmp_path).train(training)(pixels)
    assert plain.cls is plain.saliency is plain.keys is None
    for readout in ("attention", "similarity"):
        read = tower_of(model, tmp_path, readout).train(training)(pixels)
        for ours, theirs in zip(read.states, plain.states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_read_has_no_gradient_but_the_class_token_has(recompute, tmp_path):
    tower = tower_of(reference("quick_gelu"), tmp_path, "attention", depths=(2,)).train()
    tower.gradient_checkpointing = recompute
    found = tower(torch.randn(2, 3, 16, 16))
    assert not found.saliency.requires_grad
    assert not found.keys.requires_grad
    found.cls.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tower.parameters())


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operators put out."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x)}
        return out


def test_no_attention_map_is_made(tmp_path):
    tower = tower_of(reference("quick_gelu"), tmp_path, "attention", depths=(2,))
    with Shapes() as shapes:
        tower(torch.randn(2, 3, 16, 16))
    assert (2, 2, 1, 17) in shapes.seen  # the class token's row
    assert not [shape for shape in shapes.seen if shape[-2:] == (17, 17)]


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_reads_nearly_the_same(autocast, tmp_path):
    tower = tower_of(reference("quick_gelu"), tmp_path, "attention", depths=(1,))
    with torch.no_grad():  # the other tests' weights are so large that rounding moves attention far
        for parameter in tower.parameters():
            parameter.mul_(0.4)
    pixels = torch.randn(2, 3, 16, 16)
    exact = tower(pixels)
    if not autocast:
        tower = tower.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = tower(pixels)
    assert found.saliency.dtype == found.keys.dtype == torch.float32
    torch.testing.assert_close(found.saliency, exact.saliency, rtol=0.03, atol=0)
    torch.testing.assert_close(found.keys, exact.keys, rtol=0, atol=0.03 * exact.keys.abs().max().item())


def test_readouts_that_do_not_exist_are_refused():
    config = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, depths=(1, 0))
    with pytest.raises(ConfigError, match=r"vision\.depths: \[1, 0\] ends with the embedding output"):
        ClipVisionTower(config, "attention")
    ClipVisionTower(config, "similarity")
    with pytest.raises(ConfigError, match="readout: 'keys' is unknown; use none, attention, similarity"):
        ClipVisionTower(config, "keys")


def test_wrong_images_are_refused(tmp_path):
    tower = tower_of(reference("quick_gelu"), tmp_path)
    with pytest.raises(ValueError, match=r"\(1, 3, 20, 20\), expected \(B, 3, 16, 16\)"):
        tower(torch.randn(1, 3, 20, 20))


def test_wrong_shapes_are_named_with_both_and_nothing_is_copied(tmp_path):
    reference("quick_gelu").save_pretrained(tmp_path)
    checkpoint = read_vision_checkpoint(tmp_path)
    tower = ClipVisionTower(VisionConfig(**{**checkpoint.facts, "mlp_ratio": 2.0, "depths": (1,)}))
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"resblocks\.0\.mlp\.c_fc\.weight has shape \(40, 16\).*needs \(32, 16\)"
    ):
        load_vision_weights(tower, checkpoint)
    for name, tensor in tower.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_missing_tensors_are_named(tmp_path):
    reference("quick_gelu").save_pretrained(tmp_path)
    checkpoint = read_vision_checkpoint(tmp_path)
    tower = ClipVisionTower(VisionConfig(**{**checkpoint.facts, "depths": (1,)}))
    del checkpoint.state["ln_pre.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*ln_pre\.weight"):
        load_vision_weights(tower, checkpoint)


def test_a_position_embedding_of_another_width_is_named(tmp_path):
    reference("quick_gelu").save_pretrained(tmp_path)
    checkpoint = read_vision_checkpoint(tmp_path)
    tower = ClipVisionTower(VisionConfig(**{**checkpoint.facts, "depths": (1,)}))
    checkpoint.state["positional_embedding"] = torch.zeros(26, 8)
    with pytest.raises(CheckpointError, match=r"positional_embedding has shape \(26, 8\).*needs \(17, 16\)"):
        load_vision_weights(tower, checkpoint)
