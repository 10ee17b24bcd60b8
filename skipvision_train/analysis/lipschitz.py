"""Spectral norms, the Lipschitz constants that Skip-Vision assumes (Theorem 8.1), and its error bounds (Sec. 5 and 8).

The paper's assumptions do not hold for the models it is about; ``docs/analysis.md`` says where. The formulas are
computed here as they are printed, so that they can stand beside what is measured.

Errors grow like a product over layers and overflow every float: all bounds are logarithms to base 10, -inf for 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def spectral_norm(weight: Tensor, iterations: int = 500, tolerance: float = 1e-7, seed: int = 0) -> float:
    """The largest singular value of a matrix, by power iteration on ``W^T W`` from a seeded random vector.

    The estimate grows towards the value and never exceeds it but by rounding. It ends when a step changes it by less
    than ``tolerance`` of itself; where the two largest singular values are close, convergence is slow, and the estimate
    lies between them.

    Args:
        weight: (n, m), any float dtype; computed in fp32 on its device (fp64 if it is fp64).
        iterations: at most.
        tolerance: relative.
        seed: of the first vector.
    """
    matrix = weight if weight.dtype == torch.float64 else weight.float()
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vector, norm = torch.nn.functional.normalize(start, dim=0).to(matrix), 0.0
    for _ in range(iterations):
        image = matrix @ vector
        found = float(image.norm())
        if abs(found - norm) <= tolerance * found:
            return found
        norm, back = found, matrix.T @ image
        vector = back / back.norm()
    return norm


@dataclass(frozen=True)
class LayerNorms:
    """Spectral norms of one layer's weights.

    Attributes:
        query, key, value: the whole projections, all heads together.
        gate, up, down: of the gated FFN ``down(act(gate x) * up x)``.
        head_dim: d_k.
    """

    query: float
    key: float
    value: float
    gate: float
    up: float
    down: float
    head_dim: int

    @property
    def attention(self) -> float:
        """L_attn = s_Q s_K s_V / sqrt(d_k) (Eq. 19 and 23); the output projection is not in it.

        The paper writes one head; the matrices here are those of all heads, which bound every head's. Dot-product
        attention is not globally Lipschitz: Eq. 21 holds for bounded inputs only, and then with their norm as a factor,
        which the paper leaves out.
        """
        return self.query * self.key * self.value / math.sqrt(self.head_dim)

    @property
    def ffn(self) -> float:
        """L_FFN = s_1 s_2 (Eq. 20 and 25) with W_2 the down projection and s_1 the larger of gate's and up's norm.

        The paper assumes ``W_2 act(W_1 x)``. A gated FFN multiplies two images of its input and is quadratic in it, so
        it has no global Lipschitz constant at all.
        """
        return self.down * max(self.up, self.gate)

    @property
    def paper(self) -> float:
        """gamma = L_attn + L_FFN, the factor of Eq. 9."""
        return self.attention + self.ffn

    @property
    def residual(self) -> float:
        """(1 + L_attn)(1 + L_FFN): the factor of a block with its two residual connections, which Eq. 9 leaves out.

        Norms are still left out: both sublayers read a normed input, whose own Lipschitz constant is that of the norm.
        """
        return (1 + self.attention) * (1 + self.ffn)


def layer_norms(layer: Any, iterations: int = 500) -> LayerNorms:
    """Of a decoder layer of the LLaMA shape."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerNorms(
        query=spectral_norm(attention.q_proj.weight, iterations),
        key=spectral_norm(attention.k_proj.weight, iterations),
        value=spectral_norm(attention.v_proj.weight, iterations),
        gate=spectral_norm(mlp.gate_proj.weight, iterations),
        up=spectral_norm(mlp.up_proj.weight, iterations),
        down=spectral_norm(mlp.down_proj.weight, iterations),
        head_dim=attention.head_dim,
    )


def telescoped(skipping: Tensor, factors: Tensor) -> Tensor:
    """log10 of the accumulated error behind every layer: Eq. 9 from layer to layer, from no error at the start.

    Equation 10 sums ``eps_skip^(l) * prod_{i=1}^{L-l} gamma^(i+1)``. Taken to the letter that product runs over layers
    2 to L-l+1, counted from the first layer whatever l is. Equation 9 multiplies an error made in layer l by the
    factors of the layers behind it: so it is read as ``prod_{j=l+1}^{L} gamma^(j)``, as many factors, those of layers
    l+1 to L. The two agree where all layers have one factor.

    Args:
        skipping: (L,) eps_skip of every layer, not negative.
        factors: (L,) gamma of every layer, not negative; the first one's multiplies nothing.

    Returns:
        (L,) float64; the last entry is eps_total.
    """
    log_skip, log_factor = skipping.double().log10(), factors.double().log10()
    error, errors = torch.tensor(-math.inf, dtype=torch.float64), []
    for skip, factor in zip(log_skip, log_factor, strict=True):
        error = _log_add(error + factor if error > -math.inf else error, skip)
        errors.append(error)
    return torch.stack(errors)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log10(10^a + 10^b)."""
    return torch.logaddexp(a * math.log(10), b * math.log(10)) / math.log(10)


def closed_form(skipping: float, factor: float, layers: int) -> float:
    """log10 of ``eps (gamma^L - 1) / (gamma - 1)`` (Eq. 11 and 26); with gamma 1 its limit ``eps L``.

    Args:
        skipping: eps, at least every layer's skipping error.
        factor: gamma, at least every layer's factor; positive.
        layers: L.
    """
    if not skipping:
        return -math.inf
    growth = math.log(factor)
    if growth == 0:
        total = math.log(layers)
    elif growth > 0:
        total = layers * growth + math.log(-math.expm1(-layers * growth)) - math.log(math.expm1(growth))
    else:
        total = math.log(-math.expm1(layers * growth)) - math.log(-math.expm1(growth))
    return math.log10(skipping) + total / math.log(10)


def kl_bound(log10_error: float, variance: float, similarity_error: float = 0.0) -> float:
    """log10 of ``(eps_total + eps_sim)^2 / (2 sigma^2)`` (Eq. 12 and 13), in nats.

    Args:
        log10_error: log10 of eps_total.
        variance: sigma^2, of the logits.
        similarity_error: eps_sim; 0 gives Eq. 12.
    """
    errors = [torch.tensor(value, dtype=torch.float64) for value in (log10_error, _log10(similarity_error))]
    return 2 * float(_log_add(*errors)) - math.log10(2 * variance)


def similarity_error(theta: float) -> float:
    """eps_sim = sqrt(1 - theta): Eq. 13 says O(sqrt(1 - theta)), the constant is taken as 1."""
    return math.sqrt(max(0.0, 1 - theta))


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
