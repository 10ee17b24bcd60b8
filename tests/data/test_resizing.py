"""Resizing against a slow computation in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision_train.data import resizing
from skipvision_train.data.resizing import bicubic, resize_lanczos, resize_pillow, resize_torch
from skipvision_train.errors import ConfigError


def cubic(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def lanczos(x):
    return np.sinc(x) * np.sinc(x / 3) if abs(x) < 3 else 0.0


def weights(source, target, kernel):
    """(target, source): the kernel is as wide as the shrinking asks for."""
    scale = source / target
    width = max(scale, 1.0)
    found = np.array([[kernel((j + 0.5 - (i + 0.5) * scale) / width) for j in range(source)] for i in range(target)])
    return found / found.sum(1, keepdims=True)


def slow_resize(levels, size, kernel):
    """Rows, then columns; whole levels from 0 to 255 after each."""
    down, across = (weights(a, b, kernel) for a, b in zip(levels.shape[:2], size, strict=True))
    rows = np.rint(np.einsum("jb,abc->ajc", across, levels.astype(float)).clip(0, 255))
    return np.rint(np.einsum("ia,ajc->ijc", down, rows).clip(0, 255))


def noise(height, width, hard, seed=0):
    random = np.random.default_rng(seed)
    if hard:
        return random.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


sizes = st.tuples(st.integers(1, 80), st.integers(1, 80))


@settings(max_examples=150)
@given(sizes, sizes, st.booleans())
@example((48, 64), (33, 67), True)  # torch and Pillow 13 take the passes in another order here
@example((33, 10), (32, 32), True)
def test_torch_resizes_rows_before_columns(size, wanted, hard):
    levels = noise(*size, hard)
    found = resize_torch(levels, wanted)
    assert (found.shape, found.dtype) == ((*wanted, 3), np.uint8)
    # A level of rounding in each pass, and another one where 16 bits are too few for the coefficients.
    assert abs(found - slow_resize(levels, wanted, cubic)).max() <= 2


@pytest.mark.parametrize("hard", [False, True])
def test_few_levels_of_torch_differ(hard):
    levels = noise(120, 160, hard)
    for wanted in [(90, 90), (60, 80), (200, 200)]:
        assert (resize_torch(levels, wanted) != slow_resize(levels, wanted, cubic)).mean() < 0.02


@pytest.mark.parametrize("wanted", [(40, 40), (13, 13), (90, 90)])
@pytest.mark.parametrize("hard", [False, True])
def test_pillow_in_squares(wanted, hard):
    levels = noise(50, 50, hard)
    assert abs(resize_pillow(levels, wanted) - slow_resize(levels, wanted, cubic)).max() <= 1
    assert abs(resize_lanczos(levels, wanted) - slow_resize(levels, wanted, lanczos)).max() <= 1


def test_pillow_is_the_pillow_that_is_installed():
    levels = noise(48, 64, hard=True)
    expected = Image.fromarray(levels).resize((67, 33), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_pillow(levels, (33, 67)), np.asarray(expected))


@pytest.mark.parametrize("resize", [resize_torch, resize_pillow, resize_lanczos])
def test_levels_of_any_strides(resize):
    levels = noise(30, 40, hard=False)
    turned = levels.swapaxes(0, 1)[::-1]
    assert np.array_equal(resize(turned, (20, 25)), resize(turned.copy(), (20, 25)))
    assert np.array_equal(resize(turned, (40, 30)), turned)


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (20000, 3)])
def test_torch_on_extreme_images(size):
    grey = np.full((*size, 3), 201, dtype=np.uint8)
    assert abs(resize_torch(grey, (32, 32)).astype(int) - 201).max() <= 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("AVX2", resize_torch), ("AVX512", resize_torch), ("DEFAULT", resize_pillow), ("NO AVX", resize_pillow)],
)
def test_auto_takes_what_is_faster_on_this_processor(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    resizing._faster.cache_clear()
    assert bicubic() is bicubic("auto") is expected
    resizing._faster.cache_clear()


def test_an_unknown_resizer_is_refused():
    assert (bicubic("torch"), bicubic("pillow")) == (resize_torch, resize_pillow)
    with pytest.raises(ConfigError, match=r"resizer: 'lanczos' is unknown; use auto, torch, pillow"):
        bicubic("lanczos")
