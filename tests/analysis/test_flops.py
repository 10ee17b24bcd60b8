"""FLOPs against printed figures and against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from skipvision_train.analysis import flops
from skipvision_train.errors import PlanError
from skipvision_train.models.configuration import ConnectorConfig, ReducerConfig, VisionConfig
from skipvision_train.models.connectors import MultiScaleResampler
from skipvision_train.models.vision import ClipVisionTower
from skipvision_train.plans import TokenKind, dense, ffn_skip, shortv, skip_ffn, vskip
from skipvision_train.plans.plan import DENSE_RULE

LLAVA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
)
LLAVA_COUNTS = {TokenKind.TEXT: 66.64, TokenKind.RETAINED: 576}
NINETEEN = tuple(range(12, 31))


@pytest.mark.parametrize(
    ("plan", "printed"),
    [
        (dense(32), "8.540"),
        (vskip(32, NINETEEN), "7.690"),
        (vskip(32, NINETEEN, bypass="norm"), "7.690"),
        (shortv(32, NINETEEN), "4.730"),
        (ffn_skip(32, NINETEEN), "5.58"),
    ],
)
def test_llava_7b_figures(plan, printed):
    tera = flops.sequence_flops(LLAVA_7B, LLAVA_COUNTS, plan).total / 1e12
    assert f"{tera:.{len(printed) - 2}f}" == printed


@pytest.mark.parametrize(("text_only_layers", "printed"), [(16, "4.703"), (15, "4.943")])
def test_withdrawal_of_visual_tokens(text_only_layers, printed):
    full = flops.layer_flops(LLAVA_7B, LLAVA_COUNTS, DENSE_RULE).total
    text = flops.layer_flops(LLAVA_7B, {TokenKind.TEXT: 66.64}, DENSE_RULE).total
    total = (32 - text_only_layers) * full + text_only_layers * text
    assert f"{total / 1e12:.3f}" == printed


def test_vskip_saving_is_mostly_projections():
    full = flops.layer_flops(LLAVA_7B, LLAVA_COUNTS, DENSE_RULE)
    skipped = flops.layer_flops(LLAVA_7B, LLAVA_COUNTS, vskip(1, [0]).rules[0])
    assert f"{(full.projections - skipped.projections) / 1e9:.2f}" == "38.65"
    assert f"{(full.attention - skipped.attention) / 1e9:.2f}" == "6.06"
    assert full.ffn == skipped.ffn


def _ratio(n_attention, n_ffn, reference):
    cost = flops.paper_visual_flops(n_attention, n_ffn, 4096, 14336)
    return f"{100 * cost / flops.paper_visual_flops(reference, reference, 4096, 14336):.1f}"


@pytest.mark.parametrize(
    ("n_attention", "n_ffn", "reference", "printed"),
    [
        (258, 102, 576, "25.1"),
        (256, 100, 576, "24.7"),
        (572, 256, 576, "60.3"),
        (528, 272, 1296, "26.0"),
        (530, 275, 1296, "26.2"),
        (1154, 578, 2880, "24.7"),
        (2882, 578, 2880, "47.3"),
        (256, 256, 576, "44.0"),
        (144, 144, 576, "24.6"),
    ],
)
def test_skip_vision_table_2(n_attention, n_ffn, reference, printed):
    assert _ratio(n_attention, n_ffn, reference) == printed


@pytest.mark.parametrize(("full_layers", "printed"), [(2, "29.4"), (3, "31.7")])
def test_fastv_by_the_papers_formula(full_layers, printed):
    full, kept = (flops.paper_visual_flops(n, n, 4096, 14336) for n in (576, 144))
    assert f"{100 * (full_layers * full + (32 - full_layers) * kept) / (32 * full):.1f}" == printed


def _counted(module, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    return counter.get_flop_counts()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_prefill_agrees_with_the_counter_of_torch(text_config_factory, kv_heads):
    config = text_config_factory()
    config.num_key_value_heads = kv_heads
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    length = 23
    counts = _counted(model, torch.randint(4, 300, (1, length)), use_cache=False, logits_to_keep=1)
    layers = {name: sum(ops.values()) for name, ops in counts.items() if name.count(".") == 3 and ".layers." in name}
    assert len(layers) == config.num_hidden_layers

    expected = flops.sequence_flops(config, {TokenKind.TEXT: length, TokenKind.PAD: 7}, dense(3))
    assert list(layers.values()) == [layer.total for layer in expected.layers]
    assert sum(counts["LlamaForCausalLM.lm_head"].values()) == flops.lm_head_flops(config)


def test_skipped_kinds_cost_keys_and_values_only(tiny_text_config):
    """One skipped token more or less changes K, V and the width of the others' attention rows, nothing else."""
    rule = shortv(1, [0]).rules[0]
    base = {TokenKind.TEXT: 10, TokenKind.RETAINED: 5}
    more = {TokenKind.TEXT: 10, TokenKind.RETAINED: 6}
    a, b = (flops.layer_flops(tiny_text_config, counts, rule) for counts in (base, more))
    assert b.projections - a.projections == 2 * 32 * (2 * 16)
    assert b.attention - a.attention == 4 * 10 * 32
    assert b.ffn == a.ffn == 6 * 10 * 32 * 48


def test_decode_step_agrees_with_the_counter_of_torch(tiny_text_config):
    tiny_text_config._attn_implementation = "eager"
    model = LlamaForCausalLM(tiny_text_config).eval()
    with torch.no_grad():
        cache = model(torch.randint(4, 300, (1, 9)), use_cache=True).past_key_values
    counts = _counted(model, torch.randint(4, 300, (1, 1)), past_key_values=cache)
    layers = [sum(ops.values()) for name, ops in counts.items() if name.count(".") == 3 and ".layers." in name]
    expected = flops.decode_flops(tiny_text_config, {TokenKind.TEXT: 9}, dense(3))
    assert layers == [layer.total for layer in expected.layers]


def test_eviction_shrinks_cache_and_decode():
    counts = {TokenKind.TEXT: 60, TokenKind.RETAINED: 273, TokenKind.SUMMARY: 2, TokenKind.SKIPPED: 255}
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert flops.kv_cache_bytes(config, counts, dense(32)) == 590 * 32 * 2 * 1024 * 2
    assert flops.kv_cache_bytes(config, counts, skip_ffn(32)) == 335 * 32 * 2 * 1024 * 2
    saved = flops.decode_flops(config, counts, dense(32)).total - flops.decode_flops(config, counts, skip_ffn(32)).total
    assert saved == 32 * 4 * 255 * 4096


def test_plan_of_another_depth_is_refused(tiny_text_config):
    with pytest.raises(PlanError, match="5 layers, the model has 3"):
        flops.sequence_flops(tiny_text_config, {TokenKind.TEXT: 4}, dense(5))


def test_merging_costs_nothing_when_nothing_merges():
    assert flops.merge_flops(ReducerConfig.off(), 1024, 4096) == 0
    assert flops.merge_flops(ReducerConfig(local_keep=1024), 1024, 4096) == 0
    assert flops.merge_flops(ReducerConfig(local_keep=256), 1024, 4096) == 2 * 1024 * 1024 * 4096


def test_vision_and_connector_by_hand():
    """One block, one patch grid of 2 x 2, one level: small enough to write out."""
    vision = VisionConfig(
        image_size=8, patch_size=4, width=8, layers=4, heads=2, mlp_ratio=2.0, depths=(1,), quick_gelu=False
    )
    qkvo = 4 * 2 * 5 * 8 * 8
    attention = 2 * 2 * 5 * 5 * 8
    mlp = 2 * 2 * 5 * 8 * 16
    patches = 2 * 4 * 48 * 8
    assert flops.vision_flops(vision) == patches + qkvo + attention + mlp

    connector = ConnectorConfig(windows=(2,), queries=(3,), head_dim=4)
    cross = 2 * 3 * 8 * 8 * 2 + 2 * 4 * 8 * 16 + 2 * 2 * 3 * 4 * 8
    mlp = 2 * 2 * 3 * 8 * 32
    assert flops.connector_flops(connector, vision, text_width=32) == cross + mlp + 2 * 3 * 8 * 32


def test_vision_and_connector_agree_with_the_counter_of_torch(tiny_config):
    vision, connector = tiny_config.vision_config, tiny_config.connector_config
    # In training mode, because the counter does not know the fused attention of nn.MultiheadAttention.
    tower = ClipVisionTower(vision).train().requires_grad_(False)
    resampler = MultiScaleResampler(connector, vision.grid, vision.width, len(vision.depths), 32).requires_grad_(False)
    image = torch.randn(1, 3, vision.image_size, vision.image_size)
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels for the CPU are unknown to the counter
        counted = [sum(_counted(m, x)["Global"].values()) for m, x in ((tower, image), (resampler, tower(image)))]
    assert counted == [flops.vision_flops(vision), flops.connector_flops(connector, vision, 32)]
