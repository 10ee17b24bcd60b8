"""The models that ``train_step.py`` times, as the experiments build them, and one optimizer step of them."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import TEXT_BEFORE, Sample, Stopwatch, make_layout
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from step_flops import Row, StepFlops, step_flops
from torch import Tensor

from skipvision_train.analysis.flops import skip_vision_flops
from skipvision_train.config.resolve import model_config
from skipvision_train.config.specs import TrainConfig
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import dense
from skipvision_train.plans.layout import IGNORE_INDEX
from skipvision_train.resources import resource_dir
from skipvision_train.training.stages import apply_rates, parameter_groups

SETTINGS = {"cos": ("cos_dense", "sv_cos"), "llava": ("llava", "sv_llava"), "llava_hd": ("llava_hd", "sv_llava_hd")}
"""Setting -> experiments of the dense arrangement and of Skip-Vision."""

DEPTHS = {"cos": "[1,2]", "llava": "[2]", "llava_hd": "[2]"}
"""What the connector reads of the CPU geometry's tower."""

PRECISIONS = ("fp32", "autocast", "bf16", "bf16_states")
"""fp32; autocast: fp32 weights, computed in bf16, as without DeepSpeed; bf16: bf16 weights, fp32 copies and moments in
the optimizer, as with DeepSpeed; bf16_states: weights and moments in bf16, which halves them and leaves more room for
layers."""

BUCKET = 2**28
"""Weights whose gradients are held in fp32 at a time."""


def geometry_overrides(args: argparse.Namespace, setting: str) -> list[str]:
    """What the geometry changes of an experiment's model: nothing but the depth for ``llama3_8b``."""
    layers = [] if args.layers is None else [f"model.text.num_hidden_layers={args.layers}"]
    if args.geometry == "llama3_8b":
        return layers
    width = args.width
    text = {
        "hidden_size": width,
        "intermediate_size": 7 * width // 2,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "num_hidden_layers": 4,
        "vocab_size": 4096,
    }
    vision = {"width": width // 4, "layers": 2, "heads": width // 256, "depths": DEPTHS[setting]}
    changed = [
        f"model.{part}.{key}={value}"
        for part, values in (("text", text), ("vision", vision))
        for key, value in values.items()
    ]
    return [*changed, *layers]


def experiment_config(experiment: str, overrides: Sequence[str]) -> TrainConfig:
    """An experiment of ``conf/experiment``, composed as ``skipvision train`` does it."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        composed = compose("train", overrides=[f"experiment={experiment}", *overrides])
    return OmegaConf.to_object(composed)  # type: ignore[return-value]


class MasterAdamW:
    """AdamW on fp32 copies of half-precision weights, with fp32 moments, as DeepSpeed's bf16 engine keeps them.

    Args:
        groups: as ``parameter_groups`` makes them.
        fused: whether to run torch's fused kernel.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], fused: bool) -> None:
        self.buckets: list[tuple[list[Tensor], list[Tensor], torch.optim.Optimizer]] = []
        for group in groups:
            for weights in _buckets(group["params"]):
                masters = [weight.detach().float() for weight in weights]
                optimizer = torch.optim.AdamW([{**group, "params": masters}], fused=fused)
                self.buckets.append((weights, masters, optimizer))

    @torch.no_grad()
    def step(self) -> None:
        """One step; weights without a gradient stay."""
        for weights, masters, optimizer in self.buckets:
            for weight, master in zip(weights, masters, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_(weights, masters)


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of at most ``BUCKET`` weights, or of one tensor that is larger."""
    bucket: list[Tensor] = []
    for weight in weights:
        if bucket and sum(w.numel() for w in bucket) + weight.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(weight)
    yield bucket


@dataclass(frozen=True)
class Arrangement:
    """One of the two models of a setting, ready to train.

    Attributes:
        name: of the experiment.
        cfg: its configuration.
        config: the model's.
        model: with what it trains unfrozen, under the dense plan until :func:`running` says otherwise.
        batch: what ``forward`` takes, its tensors on the model's device, its layout on the CPU.
        row: what is in a row of it.
    """

    name: str
    cfg: TrainConfig
    config: SkipVisionConfig
    model: SkipVisionForConditionalGeneration
    batch: dict[str, Any]
    row: Row

    def flops(self, checkpointing: bool) -> StepFlops:
        """FLOPs of a row of a step."""
        return step_flops(self.config, self.row, self.cfg.stage.lr.vision is not None, checkpointing)

    def paper_flops(self) -> float:
        """The paper's count of a row: visual tokens in the decoder."""
        counts = Counter(self.config.image_token_kinds(self.row.tiles))
        return skip_vision_flops(self.config.text_config, counts, self.config.plan_or_dense()).total


def make_batch(config: SkipVisionConfig, row: Row, rows: int, device: str) -> dict[str, Any]:
    """Equal rows of random tokens and pixels: 35 text tokens, the image, the rest of the text, its end supervised."""
    generator = torch.Generator().manual_seed(0)
    image = config.image_token_kinds(row.tiles)
    layout = make_layout(rows, image, row.text)
    input_ids = torch.randint(config.image_token_id, layout.kinds.shape, generator=generator)
    input_ids[:, TEXT_BEFORE : TEXT_BEFORE + len(image)] = config.image_token_id
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, -row.supervised :] = input_ids[:, -row.supervised :]
    size = config.vision_config.image_size
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": torch.randn(rows * row.tiles, 3, size, size, generator=generator),
    }
    tensors = {name: tensor.to(device) for name, tensor in batch.items()}
    return {**tensors, "token_layout": layout.with_labels(labels), "image_tiles": (row.tiles,) * rows}


def make_pair(args: argparse.Namespace, setting: str, rows: int) -> tuple[Arrangement, Arrangement]:
    """The dense and the skipping model of a setting, over the same weights; the latter has summary tokens besides."""
    overrides, made = geometry_overrides(args, setting), []
    cfgs = [experiment_config(name, overrides) for name in SETTINGS[setting]]
    whole_config, skip_config = (model_config(cfg, None) for cfg in cfgs)
    dtype = torch.bfloat16 if args.precision.startswith("bf16") else torch.float32
    torch.manual_seed(0)
    with torch.device(args.device):
        skip = SkipVisionForConditionalGeneration(skip_config).to(dtype)  # type: ignore[arg-type]
        skip.set_plan(dense())
        whole = SkipVisionForConditionalGeneration(whole_config, skip.language_model)
    whole.connector = skip.connector
    whole.vision_tower.load_state_dict(skip.vision_tower.state_dict(keep_vars=True), assign=True)
    apply_rates(skip, cfgs[1].stage.lr)
    pairs = ((whole_config, whole), (skip_config, skip))
    for name, cfg, (config, model) in zip(SETTINGS[setting], cfgs, pairs, strict=True):
        if args.checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the name of transformers 5.17
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        row = Row(args.text, args.supervised, config.tiling_config.counts[-1])
        batch = make_batch(config, row, rows, args.device)
        made.append(Arrangement(name, cfg, config, model.train(), batch, row))
    return made[0], made[1]


@contextmanager
def running(arrangement: Arrangement) -> Iterator[SkipVisionForConditionalGeneration]:
    """The model under its own plan. The decoder is shared, so that it must be given back as it was."""
    model = arrangement.model
    model.set_plan(arrangement.config.plan_or_dense())
    try:
        yield model
    finally:
        model.set_plan(dense())


class Trainer:
    """Steps of the two models of a setting, with one optimizer for their weights.

    Args:
        args: the options.
        skip: the skipping arrangement, which has all the weights.
    """

    def __init__(self, args: argparse.Namespace, skip: Arrangement) -> None:
        self.args, self.device = args, torch.device(args.device)
        groups = parameter_groups(skip.model, skip.cfg.stage.lr, skip.cfg.stage.weight_decay)
        self.weights = [weight for group in groups for weight in group["params"]]
        self.max_norm = skip.cfg.stage.max_grad_norm
        fused = self.device.type == "cuda"
        self.optimizer: MasterAdamW | torch.optim.AdamW
        if args.precision == "bf16":
            self.optimizer = MasterAdamW(groups, fused)
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=fused)

    def autocast(self) -> torch.autocast:
        """What the forward pass runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "autocast")

    def forget(self) -> None:
        """Free the gradients."""
        for weight in self.weights:
            weight.grad = None

    def step(self, arrangement: Arrangement) -> Sample:
        """``--accumulation`` forward and backward passes, clipping and AdamW."""
        batch, times = arrangement.batch, self.args.accumulation
        supervised = times * int((batch["labels"] != IGNORE_INDEX).sum())
        with running(arrangement) as model, Stopwatch(self.device, self.args.clock) as compute:
            for _ in range(times):
                with self.autocast():
                    # Without a cache, which nothing reads: transformers would make one for the dense model.
                    loss = model(**batch, num_items_in_batch=supervised, use_cache=False).loss
                loss.backward()
        with Stopwatch(self.device, self.args.clock) as optimizer:
            torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm)
            self.optimizer.step()
            self.forget()
        return Sample(
            compute.seconds + optimizer.seconds,
            None if compute.peak_bytes is None else max(compute.peak_bytes, optimizer.peak_bytes or 0),
            optimizer_seconds=optimizer.seconds,
        )

    def saved_bytes(self, arrangement: Arrangement) -> int:
        """What autograd keeps of a forward pass for the backward pass, in bytes; weights left out."""
        weights = {weight.untyped_storage().data_ptr() for weight in arrangement.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with running(arrangement) as model, self.autocast(), hooks:
            loss = model(**arrangement.batch, use_cache=False).loss
        del loss  # only now: it keeps the graph, and the graph what was noted
        return sum(kept.values())

    def decoder(self, arrangement: Arrangement) -> Sample:
        """Forward and backward pass of the decoder's layers over random embeddings."""
        layout = replace(arrangement.batch["token_layout"], read=None)
        shape = (*layout.kinds.shape, arrangement.config.text_config.hidden_size)
        embeds = torch.randn(shape, device=self.device, dtype=self.weights[0].dtype, requires_grad=True)
        gradient = torch.randn_like(embeds)
        with running(arrangement) as model:
            keyword = {} if model.plan.is_dense else {"token_layout": layout}
            with Stopwatch(self.device, self.args.clock) as watch:
                with self.autocast():
                    hidden = model.language_model.model(inputs_embeds=embeds, use_cache=False, **keyword)[0]
                hidden.backward(gradient.to(hidden.dtype))
        self.forget()
        return Sample(watch.seconds, watch.peak_bytes)
