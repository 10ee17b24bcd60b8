"""Published connectors at small widths: torch's layers under the names of the public code, wired as it wires them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from skipvision_train.models.mqt import resize_positions, sincos_positions

WIDTH, LLM, GRID, DEPTHS = 32, 32, 8, (1, 2)
"""Channels of the tower and of the language model, patches per side, depths that are read."""


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def llava(layers: int = 2) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Linear(WIDTH, LLM)]
    for _ in range(layers - 1):
        modules += [nn.GELU(), nn.Linear(LLM, LLM)]
    return randomise(nn.Sequential(*modules))


def named(module: nn.Module, prefix: str) -> dict:
    return {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}


class PublishedMqt(nn.Module):
    """Names and wiring of MQT-LLaVA: one ``MultiheadAttention``, a matrix applied from the right."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        place = sincos_positions(side, WIDTH, torch.device("cpu"))
        self.pos_embed = nn.Parameter(place, requires_grad=False)
        self.query = nn.Parameter(torch.zeros(side * side, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, heads)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(WIDTH, LLM))

    def forward(self, x: torch.Tensor, used: int) -> torch.Tensor:
        place = resize_positions(self.pos_embed, GRID)
        q = self.ln_q(self.query + self.pos_embed)[:used, None].repeat(1, len(x), 1)
        k = self.ln_k(place)[:, None].repeat(1, len(x), 1)
        return self.attn(q, k, self.ln_v(x.transpose(0, 1)))[0].transpose(0, 1) @ self.proj


class PublishedPacker(nn.Module):
    """Names and wiring of TokenPacker, with a mask over all patches in place of its cells."""

    def __init__(self, width: int, heads: int, depths: int) -> None:
        super().__init__()
        self.q_proj_1 = nn.Linear(WIDTH, width, bias=False)
        self.k_proj_1, self.v_proj_1 = (
            nn.Sequential(nn.Linear(depths * WIDTH, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, LLM), nn.GELU(), nn.Linear(LLM, LLM))

    def forward(self, states: tuple[torch.Tensor, ...], scale: int) -> torch.Tensor:
        side, every = GRID // scale, torch.cat(states, dim=-1)
        image = states[-1].view(-1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        small = F.interpolate(image, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)
        place = torch.arange(GRID * GRID)
        cell = place // GRID // scale * side + place % GRID // scale
        hidden = cell[None] != torch.arange(side * side)[:, None]
        query, key = self.ln_q_1(self.q_proj_1(small)), self.ln_k_1(self.k_proj_1(every))
        return self.mlp(self.clip_attn(query, key, self.ln_v_1(self.v_proj_1(every)), attn_mask=hidden)[0])


class PublishedCos:
    """State and computation of Chain-of-Sight as Skip-Vision's code names it: by window, depth and queries."""

    def __init__(self, windows: tuple[int, ...], queries: tuple[int, ...], head_dim: int) -> None:
        torch.manual_seed(0)
        self.windows, self.queries, self.head_dim = windows, queries, head_dim
        self.state = {"ln_out.weight": torch.rand(WIDTH), "ln_out.bias": torch.randn(WIDTH)}
        self._linear("out_proj", WIDTH, LLM)
        for window, count in zip(windows, queries, strict=True):
            self.state[f"cls_token_w{window}_q{count}"] = torch.randn(1, count, WIDTH)
            for depth in DEPTHS:
                end = f"0_w{window}_l{depth}_q{count}"
                self._linear(f"attn_{end}.to_q", WIDTH, WIDTH, bias=False)
                self._linear(f"attn_{end}.to_kv", WIDTH, 2 * WIDTH, bias=False)
                self._linear(f"attn_{end}.proj", WIDTH, WIDTH)
                self._linear(f"mlp_{end}.fc1", WIDTH, 4 * WIDTH)
                self._linear(f"mlp_{end}.fc2", 4 * WIDTH, WIDTH)
                for norm in (f"attn_{end}.query_norm", f"attn_{end}.cont_norm", f"ln_{end}"):
                    self.state |= {f"{norm}.weight": torch.rand(WIDTH), f"{norm}.bias": torch.randn(WIDTH)}

    def _linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        self.state[f"{name}.weight"] = torch.randn(outputs, inputs) * 0.3
        if bias:
            self.state[f"{name}.bias"] = torch.randn(outputs) * 0.3

    def run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def window(self, states: tuple[torch.Tensor, ...], level: int, row: int, column: int) -> torch.Tensor:
        """The tokens of one window of the first image."""
        window, count = self.windows[level], self.queries[level]
        side = GRID // window
        each = count // side**2
        first = (row * side + column) * each
        tokens = self.state[f"cls_token_w{window}_q{count}"][0, first : first + each]
        for state, depth in zip(states, DEPTHS, strict=True):
            end = f"0_w{window}_l{depth}_q{count}"
            image = state[0].view(GRID, GRID, WIDTH)
            inside = image[row * window : (row + 1) * window, column * window : (column + 1) * window].reshape(
                -1, WIDTH
            )
            k, v = self.run(f"attn_{end}.to_kv", self.norm(f"attn_{end}.cont_norm", inside)).chunk(2, dim=-1)
            q = self.run(f"attn_{end}.to_q", self.norm(f"attn_{end}.query_norm", tokens))
            heads = [
                (a @ b.T * self.head_dim**-0.5).softmax(-1) @ c
                for a, b, c in zip(*(x.split(self.head_dim, dim=-1) for x in (q, k, v)), strict=True)
            ]
            tokens = tokens + self.run(f"attn_{end}.proj", torch.cat(heads, dim=-1))
            hidden = F.gelu(self.run(f"mlp_{end}.fc1", self.norm(f"ln_{end}", tokens)))
            tokens = tokens + self.run(f"mlp_{end}.fc2", hidden)
        return self.run("out_proj", self.norm("ln_out", tokens))
