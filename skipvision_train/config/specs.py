"""The typed configuration of ``skipvision train``: what YAML files and overrides may say.

Mutable mirrors of the model's frozen configuration classes stand here, because Hydra composes into them and because
this module must not import torch. A test holds their fields and defaults equal to the originals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skipvision_train.config.plans import PlanSpec


@dataclass
class TextSpec:
    """The dimensions of a LLaMA; LLaMA-3-8B by default. Read only if no weights are given (``model.llm`` null)."""

    vocab_size: int = 128256
    """Rows of the embedding and of the LM head; must hold every id of the tokenizer."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 14336
    """Width of the feed-forward network."""
    num_hidden_layers: int = 32
    """Decoder layers; a plan has one rule for each."""
    num_attention_heads: int = 32
    """Query heads."""
    num_key_value_heads: int = 8
    """Key and value heads; divides the query heads."""
    max_position_embeddings: int = 8192
    """Longest sequence the rotary embedding is meant for; ``data.max_length`` may not exceed it."""
    rope_theta: float = 500000.0
    """Base of the rotary angles."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the norms."""
    tie_word_embeddings: bool = False
    """The LM head shares the embedding's weights."""


@dataclass
class VisionSpec:
    """The CLIP tower; see ``models.configuration.VisionConfig`` for the meaning of each field."""

    image_size: int = 448
    """Pixels per side; a multiple of ``patch_size``. The position embedding is interpolated to it."""
    patch_size: int = 14
    """Pixels per side of a patch."""
    width: int = 1024
    """Channels."""
    layers: int = 24
    """Blocks."""
    heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP over ``width``."""
    quick_gelu: bool = True
    """OpenAI's activation; must agree with the weights."""
    depths: list[int] = field(default_factory=lambda: [15, 22])
    """Hidden states that the connector reads; i is the output of block i, counted from 1."""
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    """Subtracted from pixels in [0, 1]."""
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    """Divides them."""


@dataclass
class TilingSpec:
    """How an image becomes square tiles; see ``models.settings.TilingConfig``."""

    mode: str = "none"
    """none: one tile. aspect: the grid of tiles whose aspect ratio is closest. square: padded to a square, cut into
    max_tiles. The global view stands first."""
    max_tiles: int = 4
    """Local tiles of an image at most."""


@dataclass
class ReducerSpec:
    """Which visual tokens skip, and what happens to them; see ``models.settings.ReducerConfig``."""

    split: str = "finest"
    """Local tokens, which skip: finest (level of the resampler), saliency (all but the most salient), tiles (all but
    the global view), or none, the dense arrangement."""
    retain: int | None = None
    """With saliency: so many tokens are retained."""
    retain_by: str = "attention"
    """What saliency is: attention of the class token, or its similarity."""
    local_keep: int | None = 256
    """Merge the local tokens down to so many; null merges nothing."""
    merge_order: str = "similarity"
    """Order of merged tokens: similarity (released code) or raster."""
    merge_rounds: int = 1
    """Merge in so many rounds; the paper merges in one."""
    merge_weighted: bool = True
    """With several rounds: every original token counts the same in a mean."""
    summary: str = "both"
    """Summary tokens: both, former, latter or none."""
    former_over: str = "middle"
    """What the former summarises: middle (released code for CoS), retained (paper) or skipped."""
    latter_over: str = "skipped"
    """What the latter summarises: skipped, retained or middle."""
    summary_layers: str = "shared"
    """One scorer for both summary tokens (shared, released code), or separate ones."""
    last_local_ffn: bool = True
    """The last local token runs the FFN and stays in the cache."""
    registers: int = 0
    """Learned tokens behind every image, for Victor; a later stage may not change their number."""


@dataclass
class ModelSpec:
    """The model of a stage."""

    llm: str | None = None
    """Directory of a LLaMA-architecture model with tokenizer; null builds ``text`` with random weights."""
    text: TextSpec = field(default_factory=TextSpec)
    """Dimensions of the language model where no weights say them."""
    tokenizer: str | None = None
    """Tokenizer directory; null takes ``llm``'s, or that of the checkpoint the stage starts from."""
    vision_weights: str | None = None
    """CLIP checkpoint (open_clip or OpenAI file, transformers directory); null starts from random weights."""
    vision_architecture: str | None = None
    """open_clip name such as ViT-L-14, needed for a bare weights file."""
    connector_weights: str | None = None
    """LLaVA's ``mm_projector.bin``, or a model directory whose connector is taken; null starts from random weights, for
    a stage that trains it and not the language model."""
    from_scratch: bool = False
    """Allow parts without weights to be trained from random ones; without it that is an error."""
    vision: VisionSpec = field(default_factory=VisionSpec)
    """The vision tower."""
    tiling: TilingSpec = field(default_factory=TilingSpec)
    """How an image becomes tiles."""
    connector: dict[str, Any] = field(default_factory=dict)
    """``type`` and the fields of a file of ``conf/connector``, which ``connector@model.connector=mlp`` exchanges;
    :mod:`models.connector_settings` documents them."""
    reducer: ReducerSpec = field(default_factory=ReducerSpec)
    """Skipping, merging, summary tokens."""
    image_token: str = "<|reserved_special_token_0|>"
    """The tokenizer's special token that stands for one visual token; never seen by the language model itself. None
    that begins or ends texts, and none that the chat template writes."""


@dataclass
class RatesSpec:
    """Peak learning rate of each part; null freezes the part."""

    vision: float | None = None
    """The CLIP tower."""
    connector: float | None = None
    """The resampler."""
    reducer: float | None = None
    """The summary tokens' scorer."""
    llm: float | None = None
    """The language model with embedding and LM head."""


@dataclass
class SkipSpec:
    """Layers in which visual tokens leave out a sublayer, beside what ``plan`` leaves out; by default none.

    What V-Skip leaves to future work: the model is trained under the bypass that it will run under.
    """

    layers: list[int] | None = None
    """These layers; with ``widen`` they begin to skip in this order."""
    count: int | None = None
    """Instead of ``layers``: the deepest so many; with ``widen`` the deepest begins."""
    part: str = "attention"
    """What is left out: attention (V-Skip), ffn (FFN-Skip) or both (ShortV)."""
    bypass: str = "zero"
    """What replaces a skipped attention: zero, or norm, the normed layer input."""
    widen: list[float] | None = None
    """[start, end], shares of the stage's steps: from none at ``start`` to all layers from ``end`` on, one after the
    other at equal distances. null skips all of them from the first step."""


@dataclass
class LoraSpec:
    """Low-rank adapters on the language model, trained in place of its weights (peft)."""

    rank: int = 16
    """Of every adapter."""
    alpha: float = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' input, in training."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear maps of the decoder's layers that get one."""
    quantize: str | None = None
    """QLoRA: all linear maps of the decoder's layers, which are frozen, are held in 4 bits, nf4 or fp4 (bitsandbytes);
    null holds them as they are. Not with ZeRO-3."""
    double_quantize: bool = True
    """With ``quantize``: the scales of blocks of 64 weights are held in 8 bits, not in fp32."""


@dataclass
class StageSpec:
    """What trains, how fast, and from where."""

    name: str = "sft"
    """Names the stage in logs and in the run's folder."""
    start_from: str | None = None
    """Model directory of the previous stage (``<run>/model`` or a complete ``checkpoint-N``); its resampler is scaled
    to this stage's resolution. null builds the model from ``model.llm`` and ``model.vision_weights``."""
    template: str = "llama3"
    """Chat template, a name from docs/templates.md; ``plain`` is image, caption, end."""
    lr: RatesSpec = field(default_factory=RatesSpec)
    """Learning rates; at least one part must train."""
    skip: SkipSpec = field(default_factory=SkipSpec)
    """Layers that the model learns to skip; they are part of the plan that the stage's model carries."""
    schedule: str = "cosine"
    """cosine, linear or constant, after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decay; norms and biases never decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    vision_layer_decay: float | None = None
    """The tower's last block trains at ``lr.vision``, each block before it at so many times the rate of the next, its
    embedding below the first; null trains all at one rate."""
    lora: LoraSpec | None = None
    """Train adapters of the language model at ``lr.llm`` instead of its weights; the finished model is plain."""
    ema_decay: float | None = None
    """The finished model is the moving average of the weights that train: each step keeps this share of it. Not with
    ZeRO-3."""


@dataclass
class DataSpec:
    """The training data."""

    recipe: str = "???"
    """Name of a file in ``data_recipes/``, or the path of a recipe file."""
    root: str | None = None
    """Directory that the recipe's paths are relative to."""
    max_length: int = 2048
    """Longest sequence in tokens, visual ones included."""
    on_error: str = "error"
    """A record that cannot be used: ``error`` stops the run, ``skip`` counts and logs it."""
    error_budget: int = 100
    """With ``skip``: so many unusable records stop the run."""
    order: str = "shuffle"
    """shuffle: everything. shards: shards in random order, and the records of a few shards shuffled together, so that
    each file is read once. sequential: as the recipe lists them."""
    shard_buffer: int = 8
    """With ``order=shards``: so many shards are shuffled together."""
    group: str = "none"
    """length: within every global batch, records of like length share a micro batch (no step changes by it).
    modality: also, a global batch has either only records with images or only ones without."""
    pack: bool = False
    """Put several records into one row, none of which attends to another; batch sizes count rows then."""
    pack_length: int | None = None
    """Tokens of a packed row, at least ``max_length``; null is ``max_length``. Longer rows are filled better."""
    pack_by: str = "measured"
    """measured: all texts are tokenized once before the first step, and the lengths are kept in the run's folder.
    estimated: lengths follow from sizes; rows are less full, and one that turns out too long becomes two."""
    streaming: bool = False
    """Read sources from their front, without an index: for the hub, and for more shards than can be looked at first.
    Needs ``trainer.max_steps``; the sources' weights are their shares of the samples; no packing, no grouping."""
    stream_lanes: int | None = None
    """With ``streaming``: sequences that the order is made of, a multiple of the processes and a divisor of the global
    batch; null is the number of processes. With the same lanes, any number of processes sees the same steps."""
    stream_buffer: int = 1000
    """With ``streaming``: so many neighbouring records are shuffled together."""
    draft: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size where that is enough: faster, other pixels."""
    resizer: str = "auto"
    """torch: the fast kernel. pillow: LLaVA's pixels to the bit. auto: torch's where the processor has AVX2."""


@dataclass
class GuardSpec:
    """What is looked out for while a stage runs, and when it is stopped."""

    nonfinite_budget: int = 10
    """Steps with a non-finite loss or gradient are left out, weights and optimizer as before; one more than so many
    stops the run."""
    spike_threshold: float = 10.0
    """A logged loss that is so many times the usual deviation (median absolute, of the last 100 lines) above their
    median is a warning; 0 switches it off."""
    stuck_after: float = 1200.0
    """Seconds without progress of a process after which it says what every process does and ends; 0 waits for ever.
    Longer than the longest save."""
    memory: str = "error"
    """Model state and activations that do not fit the GPU before the first step: error, warn or off."""


@dataclass
class WatchSpec:
    """Answers of the model to a few fixed samples while it is trained."""

    sample_every: int = 0
    """Steps between two tables; 0 writes none."""
    sample_count: int = 4
    """Samples of a table."""
    sample_tokens: int = 64
    """Longest answer in tokens."""
    sample_recipe: str | None = None
    """Recipe of the samples; null takes them from ``data.recipe``, which the model learns."""


@dataclass
class TrainerSpec:
    """How the stage is run."""

    output_dir: str = "???"
    """The run's folder: checkpoints, metrics.jsonl, config.yaml and the finished ``model``."""
    max_steps: int | None = None
    """Optimizer steps; exactly one of this and ``epochs``."""
    epochs: float | None = None
    """Passes over the data."""
    per_device_batch: int = 8
    """Samples of one forward pass of one process."""
    global_batch: int = 128
    """Samples of one optimizer step of all processes; the accumulation follows from it."""
    seed: int = 0
    """Seeds weights, data order and samplers."""
    precision: str = "bf16"
    """fp32, or bf16 (autocast; under DeepSpeed bf16 weights with fp32 masters)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    loss: str = "chunked"
    """Cross entropy of the LM head. chunked: slices of the vocabulary where a batch's logits are many, never all in
    memory. plain: all at once. liger: liger-kernel's, on a GPU."""
    last_layer: str = "supervised"
    """Positions at which the last layer runs queries and feed-forward network: supervised (what no label is predicted
    from, nobody reads) or all. The loss differs by rounding."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two checkpoints; 0 saves only the finished model."""
    keep_checkpoints: int = 2
    """Newest complete checkpoints that are kept; 0 keeps all."""
    workers: int = 4
    """Processes that decode data, per training process; 0 decodes in the training process."""
    resume: str = "auto"
    """auto continues from the newest complete checkpoint; never refuses a folder that already holds a run."""
    progress_bar: bool = True
    """Show one on the terminal."""
    wandb: str = "off"
    """off, offline or online."""
    wandb_project: str = "skipvision"
    """Project that runs are logged under."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, into ``tensorboard`` of the run's folder."""
    peak_tflops: float | None = None
    """Peak of one device in 10^12 FLOPs per second, for the utilisation (``mfu``); null: from a table of GPUs."""
    guards: GuardSpec = field(default_factory=GuardSpec)
    """When something goes wrong."""
    watch: WatchSpec = field(default_factory=WatchSpec)
    """Answers while training."""


@dataclass
class DeepSpeedSpec:
    """The part of DeepSpeed's settings that a run chooses; batch sizes, precision and clipping follow from the rest."""

    stage: int = 2
    """ZeRO stage: 1 shards optimizer states, 2 gradients as well, 3 weights as well."""
    offload_optimizer: bool = False
    """Keep optimizer states in the CPU's memory."""
    offload_param: bool = False
    """Keep the sharded weights in the CPU's memory; stage 3 only."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on."""
    bucket_size: int = 200_000_000
    """Elements that are reduced or gathered at once; more is faster and takes more memory."""
    persistence_threshold: int = 100_000
    """Stage 3: tensors of fewer elements stay whole on every process, which saves gathering them."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further top-level keys of DeepSpeed's JSON, taken as they are."""


@dataclass
class TrainConfig:
    """Settings of ``skipvision train``."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model."""
    plan: PlanSpec = field(default_factory=PlanSpec)
    """What the model skips in training, and the plan that it carries: a file of ``conf/plan`` and its fields, or a plan
    file's path; ``own`` keeps the plan of ``stage.start_from``."""
    stage: StageSpec = field(default_factory=StageSpec)
    """The stage."""
    data: DataSpec = field(default_factory=DataSpec)
    """The data."""
    trainer: TrainerSpec = field(default_factory=TrainerSpec)
    """The run."""
    deepspeed: DeepSpeedSpec | None = None
    """null trains without DeepSpeed (one process, or DistributedDataParallel under torchrun)."""
    dry_run: bool = False
    """Show what would be trained, and stop. Needs no weights, no data and no GPU."""
