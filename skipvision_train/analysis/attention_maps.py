"""What generated tokens attend to, layer by layer: Skip-Vision's Figures 7, 8 and 13 to 17.

While the model generates, each decoding step's attention row is computed once more from the layer's own projections,
its rotary angles and the keys that its KV cache holds at that moment. So the rows are those of the model as it runs,
whatever the plan dropped, evicted or renumbered, with every attention implementation, and no full map exists.

Shapes: k generated tokens, L layers, P positions of the prompt, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipvision_train.adapters import apply
from skipvision_train.analysis.probe import KINDS, Estimate, over_samples, plain, sample_kinds
from skipvision_train.calibration.samples import Sample
from skipvision_train.errors import ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.attention import normed_heads, rotate_rows
from skipvision_train.plans.cache import EvictedLayer
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind

GENERATED = "generated"
"""What tables call the tokens that the model has written itself; the kinds are those of the prompt."""


@dataclass(frozen=True)
class AttentionTrace:
    """The rows of one sample's generated tokens.

    Attributes:
        sample: its id.
        kinds: (P,) int64, of the prompt.
        tokens: the k generated tokens that were fed back, as text.
        mean: (k, L, P) fp32, the mean over heads. A row adds up to 1 less what generated tokens get.
        heads: the same of single heads.
    """

    sample: str
    kinds: Tensor
    tokens: list[str]
    mean: Tensor
    heads: dict[int, Tensor]

    def mass(self, rows: Tensor) -> dict[str, Tensor]:
        """Per kind, and for generated tokens, (L,) float64: summed over positions, mean over the generated tokens."""
        found = {k.name.lower(): rows[..., self.kinds == k].double().sum(-1).mean(0) for k in KINDS}
        return found | {GENERATED: 1 - sum(found.values(), torch.zeros(rows.shape[1], dtype=torch.float64))}

    def image_span(self) -> slice:
        """The positions from the first to the last one that is no text."""
        where = (self.kinds != TokenKind.TEXT).nonzero()[:, 0]
        return slice(int(where[0]), int(where[-1]) + 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: per layer the mean row of the generated tokens over the image's positions."""
        span = self.image_span()
        rows = self.mean.mean(0)[:, span].tolist()
        return {
            "sample": self.sample,
            "generated": self.tokens,
            "tokens": {k.name.lower(): int((self.kinds == k).sum()) for k in KINDS},
            "first_position": span.start,
            "kinds": [TokenKind(kind).name.lower() for kind in self.kinds[span].tolist()],
            "rows": [[round(value, 7) for value in row] for row in rows],
        }


@dataclass(frozen=True)
class AttentionMaps:
    """What the generated tokens of several samples attend to.

    Attributes:
        plan: name of the plan that ran.
        evicted: whether its eviction from the KV cache held.
        traces: one per sample.
    """

    plan: str
    evicted: bool
    traces: list[AttentionTrace]

    def mass(self, head: int | None = None) -> dict[str, Estimate]:
        """Per kind that occurs (L,): the mean over samples, of all heads or of one."""
        rows = [t.mass(t.mean if head is None else t.heads[head]) for t in self.traces]
        present = [k.name.lower() for k in KINDS if any(bool((t.kinds == k).any()) for t in self.traces)]
        return {name: over_samples(torch.stack([row[name] for row in rows])) for name in [*present, GENERATED]}

    def to_dict(self) -> dict[str, Any]:
        """JSON form: mass per kind and layer, and of every sample the mean row per layer over its visual positions."""
        first = self.traces[0]
        return {
            "plan": self.plan,
            "evicted": self.evicted,
            "mass": {name: estimate.to_dict() for name, estimate in self.mass().items()},
            "mass_of_heads": {
                str(head): {name: plain(estimate.mean) for name, estimate in self.mass(head).items()}
                for head in first.heads
            },
            "samples": [trace.to_dict() for trace in self.traces],
        }


@torch.no_grad()
def attention_row(attention: Any, normed: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
    """What one token attends to, in fp32.

    Args:
        attention: the layer's ``self_attn``.
        normed: (1, C), the token as it enters attention.
        rotary: cos and sin, (1, D) each, of its position.
        keys: (G, S, D), rotated, of all slots that it sees, its own among them.

    Returns:
        (H, S).
    """
    query = rotate_rows(attention, normed_heads(attention, normed, normed)[0], rotary)[0].float()
    keys = keys.float().repeat_interleave(len(query) // len(keys), dim=0)
    return ((query[:, None] @ keys.transpose(1, 2))[:, 0] * attention.scaling).softmax(-1)


def held_columns(layer: Any) -> Tensor:
    """(S,) int64 on the CPU: the position in the sequence of every slot that a one-row cache layer holds."""
    if not isinstance(layer, EvictedLayer):
        return torch.arange(layer.keys.shape[-2])
    newer = torch.arange(layer.prompt_length, layer.prompt_length + layer.generated)
    return torch.cat([layer.columns[0].cpu(), newer])


@dataclass
class _Recorder:
    """Collects rows while a model generates.

    Attributes:
        heads: which heads are kept one by one.
        length: P; what stands behind is generated.
        steps: per decoding step and layer (1 + heads, P) fp32 on the CPU, the mean over heads first.
        decoding: whether the running forward is a decoding step.
    """

    heads: Sequence[int]
    length: int
    steps: list[list[Tensor]] = field(default_factory=list)
    decoding: bool = False

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of one token onto a filled cache is a step; a prompt with an image has more."""
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else args[0] if args else kwargs["input_ids"]
        self.decoding = tokens.shape[1] == 1
        if self.decoding:
            self.steps.append([])

    def behind_attention(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The keys of the new token are in the cache by now."""
        if not self.decoding:
            return
        normed = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        held = kwargs["past_key_values"].layers[attention.layer_idx]
        row = attention_row(attention, normed[0], (cos[0], sin[0]), held.keys[0]).cpu()
        kept = torch.stack([row.mean(0), *(row[head] for head in self.heads)])
        columns = held_columns(held)
        prompt = columns < self.length
        self.steps[-1].append(torch.zeros(len(kept), self.length).index_copy(1, columns[prompt], kept[:, prompt]))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on the decoder and on every layer's attention."""
        decoder = find_decoder(model)
        with ExitStack() as hooks:
            hooks.callback(decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True).remove)
            for layer in decoder.layers:
                hook = layer.self_attn.register_forward_hook(self.behind_attention, with_kwargs=True)
                hooks.callback(hook.remove)
            yield


@torch.no_grad()
def trace_attention(
    model: PreTrainedModel,
    processor: Any,
    sample: Sample,
    plan: SkipPlan,
    tokens: int = 8,
    heads: Sequence[int] = (),
    image_token_id: int | None = None,
) -> AttentionTrace:
    """Generate greedily and keep the attention rows of the generated tokens.

    A token's row is that of its query, when it is fed back to predict the next one. An end token is never fed back; as
    the first token it is not allowed, so that there is at least one row.

    Args:
        model: what ``skipvision_train.apply`` takes, in ``eval`` mode.
        processor: its tokenizer names the end token and decodes.
        sample: a prompt (``positions="next"``).
        plan: runs while generating.
        tokens: how many rows at most.
        heads: heads that are kept one by one.
        image_token_id: for a causal LM whose configuration names no image token.

    Raises:
        ConfigError: a head that the model does not have.
        PlanError: the plan does not fit the model.
    """
    config = find_decoder(model).config
    if wrong := [head for head in heads if not 0 <= head < config.num_attention_heads]:
        raise ConfigError(f"heads: {wrong[0]}; the model has heads 0 to {config.num_attention_heads - 1}")
    length = sample.inputs["input_ids"].shape[1]
    recorder = _Recorder(heads, length)
    ends = {}
    if isinstance(model, SkipVisionForConditionalGeneration):  # its configuration does not say how answers end
        ends = {"eos_token_id": processor.end_id, "pad_token_id": processor.pad_id}
    generator: Any = model  # transformers annotates generate() for a protocol that no model of its own satisfies
    with apply(model, plan, image_token_id=image_token_id), recorder.watching(model):
        sequence = generator.generate(
            **sample.inputs, max_new_tokens=tokens + 1, min_new_tokens=1, do_sample=False, use_cache=True, **ends
        )
    rows = torch.stack([torch.stack(step) for step in recorder.steps])  # (k, L, 1 + heads, P)
    written = sequence[0, length : length + len(rows)].tolist()
    return AttentionTrace(
        sample.id,
        sample_kinds(model, sample, image_token_id),
        [processor.tokenizer.decode([token]) for token in written],
        rows[:, :, 0],
        {head: rows[:, :, i] for i, head in enumerate(heads, start=1)},
    )


def attention_maps(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    plan: SkipPlan,
    tokens: int = 8,
    heads: Sequence[int] = (),
    evict: bool = False,
    image_token_id: int | None = None,
) -> AttentionMaps:
    """Trace several samples; the arguments are those of :func:`trace_attention`.

    Args:
        model: the model.
        processor: its processor.
        samples: prompts.
        plan: what runs.
        tokens: rows per sample at most.
        heads: heads that are kept one by one.
        evict: whether the plan's eviction holds (the first generated token that is fed back no longer sees what was
            evicted). Without it one sees what skipped tokens would get, as in the paper's figures.
        image_token_id: as there.

    Raises:
        ConfigError, PlanError: as there.
    """
    evicted = evict and bool(plan.evict)
    plan = plan if evicted else replace(plan, evict=frozenset())
    traces = [trace_attention(model, processor, s, plan, tokens, heads, image_token_id) for s in samples]
    return AttentionMaps(plan.name, evicted, traces)
