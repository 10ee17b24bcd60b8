"""Parts, freezing and optimizer groups."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from skipvision_train.config.specs import RatesSpec
from skipvision_train.errors import ConfigError
from skipvision_train.models.build import meta_model
from skipvision_train.training.stages import PARTS, apply_rates, parameter_groups, parts_of


@pytest.fixture
def model(tiny_config):
    return meta_model(tiny_config)


def test_parts_hold_every_parameter_once(model):
    counts = [sum(p.numel() for p in part.parameters()) for part in parts_of(model).values()]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert all(counts)


def test_a_parameter_outside_of_all_parts_is_an_error(model):
    model.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="extra and 0 more parameters belong to none of vision, connector"):
        parts_of(model)


@pytest.mark.parametrize("trained", [("connector",), ("llm",), ("vision", "reducer"), tuple(PARTS)])
def test_freezing(model, trained, caplog):
    with caplog.at_level(logging.INFO):
        reports = apply_rates(model, RatesSpec(**dict.fromkeys(trained, 1e-4)))
    for name, parameter in model.named_parameters():
        part = next(part for part, module in PARTS.items() if name.startswith(f"{module}."))
        assert parameter.requires_grad == (part in trained), name
    assert {r.part for r in reports if r.trainable} == set(trained)
    for report in reports:
        assert f"{report.parameters:,} parameters" in caplog.text
    assert caplog.text.count("frozen") == len(PARTS) - len(trained)


def test_unfreezing_is_explicit_too(model):
    apply_rates(model, RatesSpec(connector=1e-3))
    apply_rates(model, RatesSpec(llm=1e-3))
    assert all(p.requires_grad for p in model.language_model.parameters())
    assert not any(p.requires_grad for p in model.connector.parameters())


def test_a_part_without_parameters_cannot_be_all_that_trains(config_factory):
    from skipvision_train.models.settings import ReducerConfig

    model = meta_model(config_factory(reducer=ReducerConfig.off()))
    with pytest.raises(ConfigError, match=r"^stage\.lr: nothing trains; reducer has no parameters"):
        apply_rates(model, RatesSpec(reducer=1e-3))


def test_groups(model):
    rates = RatesSpec(vision=1e-4, connector=2e-4, llm=3e-4)
    apply_rates(model, rates)
    groups = parameter_groups(model, rates, weight_decay=0.1)
    assert {(g["name"], g["lr"], g["weight_decay"]) for g in groups} == {
        (part, rate, decay)
        for part, rate in (("vision", 1e-4), ("connector", 2e-4), ("llm", 3e-4))
        for decay in (0.0, 0.1)
    }
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_without_decay_there_is_one_group_per_part(model):
    rates = RatesSpec(connector=1e-3, llm=1e-5)
    apply_rates(model, rates)
    assert [g["name"] for g in parameter_groups(model, rates, 0.0)] == ["connector", "llm"]
