"""Tiny vision-language models of ``tests/support``, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import transformers as hf
from tiny_vlms import IDS, LAYERS, MAKERS, ROWS, TEXT, Family, make_family, randomise, slow_logits, state_of


@dataclass(frozen=True)
class Kit:
    """The helpers of this folder, for tests (conftest files cannot be imported)."""

    ids = IDS
    layers = LAYERS
    rows = ROWS
    text = TEXT
    make_family = staticmethod(make_family)
    randomise = staticmethod(randomise)
    slow_logits = staticmethod(slow_logits)
    state_of = staticmethod(state_of)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="session")
def shared_family() -> Callable[[str], Family]:
    """One model per family for tests that leave it as it was."""
    return cache(make_family)


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(shared_family: Callable[[str], Family], name: str) -> Family:
    return shared_family(name)


@pytest.fixture
def llava(shared_family: Callable[[str], Family]) -> Family:
    return shared_family("llava")


@pytest.fixture(scope="session")
def lm() -> hf.LlamaForCausalLM:
    """A language model without a vision tower: its image tokens are what the caller says."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    randomise(model)
    return model
