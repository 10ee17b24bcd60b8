"""The CLIP vision tower on open_clip's transformer, and loading weights into it.

The checkpoint formats themselves are read in ``vision_formats.py``.
Shapes: B images, S pixels per side, g = S / patch_size patches per side, W channels.
"""

from __future__ import annotations

import math

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.loading import LoadReport
from skipvision_train.models.settings import VisionConfig, one_of
from skipvision_train.models.vision_formats import VisionCheckpoint, read_vision_checkpoint, vision_facts

__all__ = [
    "READOUTS",
    "ClipVisionTower",
    "VisionCheckpoint",
    "load_vision_weights",
    "read_vision_checkpoint",
    "resize_position_embedding",
    "vision_facts",
]

READOUTS = ("none", "attention", "similarity")


class ClipVisionTower(VisionTransformer):
    """A CLIP vision transformer that stops at the deepest hidden state it is asked for.

    Blocks after ``max(config.depths)``, the final LayerNorm and the projection are not built, so every parameter of the
    tower takes part in the loss. Parameter names are those of open_clip's ``visual.*`` tensors without that prefix.
    (The tower derives from open_clip's class, rather than holding one, so that the class and position embeddings belong
    to the module whose forward uses them; ZeRO-3 gathers parameters module by module.)

    Args:
        config: the transformer's dimensions, and the depths that are handed out.
        readout: what is read off the class token at the last entry of ``config.depths``: ``none``; ``attention``, its
            attention row in the block whose output that is, and this block's keys; ``similarity``, its cosine with the
            patches. Nothing of it has weights, or changes the hidden states.

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass. The name is the one that transformers'
            ``gradient_checkpointing_enable`` sets on every module that has it.

    Raises:
        ConfigError: an unknown readout, or ``attention`` at depth 0, which no block puts out.
    """

    def __init__(self, config: VisionConfig, readout: str = "none") -> None:
        one_of("readout", readout, READOUTS)
        if readout == "attention" and config.depths[-1] == 0:
            raise ConfigError(
                f"vision.depths: {list(config.depths)} ends with the embedding output, where nothing attends; "
                "name a depth of 1 or more last"
            )
        super().__init__(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=max(config.depths),
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            act_layer=QuickGELU if config.quick_gelu else nn.GELU,
        )
        self.ln_post = nn.Identity()
        self.proj = None
        self.config = config
        self.readout = readout
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor) -> VisionFeatures:
        """Hidden states of the configured depths, patches in raster order, and what the class token says about them.

        Depth 0 is the embedding output after the first LayerNorm, depth i the output of block i: the numbering of
        ``hidden_states`` in transformers' ``CLIPVisionModel``.

        Args:
            pixel_values: (B, 3, S, S), normalised; cast to the tower's dtype.

        Returns:
            ``states`` holds one (B, g * g, W) per entry of ``config.depths``, in that order, without the class token.

        Raises:
            ValueError: the images are not ``config.image_size`` pixels square.
        """
        size, last = self.config.image_size, self.config.depths[-1]
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values: shape {tuple(pixel_values.shape)}, expected (B, 3, {size}, {size})")
        hidden = self._embeds(pixel_values.to(self.conv1.weight.dtype))
        hiddens, saliency, keys = {0: hidden}, None, None
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for depth, block in enumerate(self.transformer.resblocks, start=1):
            if self.readout == "attention" and depth == last:
                saliency, keys = class_attention(block, hidden.detach())
            hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
            hiddens[depth] = hidden
        if self.readout == "similarity":
            saliency = class_similarity(hiddens[last].detach())
        states = tuple(hiddens[depth][:, 1:] for depth in self.config.depths)
        cls = None if self.readout == "none" else hiddens[last][:, 0]
        return VisionFeatures(states=states, cls=cls, saliency=saliency, keys=keys)


@torch.no_grad()
def class_attention(block: ResidualAttentionBlock, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's attention row in a block, recomputed from the block's input: no attention map is made.

    Queries and keys are projected in the dtype of the block's weights, also under autocast; scores, softmax and the
    means are fp32.

    Args:
        block: of open_clip, H heads of width D.
        hidden: (B, 1 + n, W), the block's input, class token first.

    Returns:
        saliency: (B, n) fp32, the softmax over all 1 + n tokens, summed over heads, the class token's own part left
            out: as LLaVA's ``attentions[-2]`` is read by VisionZip and Skip-Vision.
        keys: (B, n, D) fp32, mean over heads, biases included.
    """
    # The fused projection is read outside its module's forward. Under ZeRO-3 the attribute must be read in the tower's:
    # DeepSpeed's parameter dictionary then fetches what is sharded and registers it with the module that runs
    # (ZeROOrderedDict in runtime/zero/parameter_offload.py). Seen with two processes, sharding every parameter.
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    width, heads = hidden.shape[-1], block.attn.num_heads
    with torch.autocast(hidden.device.type, enabled=False):
        normed = block.ln_1(hidden.to(weight.dtype))
        query = F.linear(normed[:, :1], weight[:width], bias[:width])
        key = F.linear(normed, weight[width : 2 * width], bias[width : 2 * width])
        query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        row = (query @ key.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=-1)
    return row[:, :, 0, 1:].sum(dim=1), key[:, :, 1:].mean(dim=1)


@torch.no_grad()
def class_similarity(hidden: Tensor) -> Tensor:
    """The cosine of the class token with every patch: (B, 1 + n, W), class token first, to (B, n) fp32."""
    return F.cosine_similarity(hidden[:, :1].float(), hidden[:, 1:].float(), dim=-1)


def resize_position_embedding(embedding: Tensor, grid: int) -> Tensor:
    """Interpolate a learned position embedding to another patch grid; the class token's row is kept.

    Bicubic, ``align_corners=False``, computed in fp32. Without antialiasing, as transformers interpolates CLIP, so that
    a tower at a new resolution equals ``CLIPVisionModel`` with ``interpolate_pos_encoding``. (open_clip antialiases,
    which in torch also means another cubic kernel, a = -0.5 in place of -0.75: the two differ when enlarging as well.)

    Args:
        embedding: (1 + g * g, W), class token first, then the grid in raster order.
        grid: the new number of patches per side.

    Returns:
        (1 + grid * grid, W) in the dtype of ``embedding``; ``embedding`` itself if the grid already fits.

    Raises:
        ValueError: the rows after the first form no square.
    """
    old = math.isqrt(embedding.shape[0] - 1)
    if old * old != embedding.shape[0] - 1:
        raise ValueError(f"positional_embedding: {embedding.shape[0]} rows are not one more than a square number")
    if old == grid:
        return embedding
    image = embedding[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = image.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return torch.cat([embedding[:1], patches.to(embedding.dtype)])


def load_vision_weights(tower: ClipVisionTower, checkpoint: VisionCheckpoint) -> LoadReport:
    """Copy a checkpoint into a tower; every parameter of the tower is set or an error is raised.

    The position embedding is interpolated if the tower runs at another resolution.

    Returns:
        a report whose ``unused`` names what the tower does not have (later blocks, ``ln_post``, ``proj``, text tower).

    Raises:
        CheckpointError: a tensor is missing or of the wrong shape; nothing has been copied then.
    """
    wanted = tower.state_dict()
    if missing := [name for name in wanted if name not in checkpoint.state]:
        raise CheckpointError(f"{checkpoint.source}: {len(missing)} tensors are missing, among them {missing[0]}")
    state = {name: checkpoint.state[name] for name in wanted}
    key = "positional_embedding"
    try:
        if state[key].shape[-1] == wanted[key].shape[-1]:
            state[key] = resize_position_embedding(state[key], tower.config.grid)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            found, right = tuple(checkpoint.state[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{checkpoint.source}: {name} has shape {found}, the tower needs {right}")
    tower.load_state_dict(state)
    unused = sorted(set(checkpoint.state) - set(wanted))
    return LoadReport(unused=(*unused, *checkpoint.other))
