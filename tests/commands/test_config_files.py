"""Every YAML file under conf/ composes into its command's dataclass, and the training ones pass validation."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from skipvision_train import cli
from skipvision_train.config import specs
from skipvision_train.config.validate import validate
from skipvision_train.models import settings
from skipvision_train.models.connector_settings import CONNECTORS, connector_dict
from skipvision_train.resources import resource_dir

CONF = resource_dir("conf")
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
GROUP_PATHS = {"connector": "connector@model.connector", "adapters": "adapters@stage.lora"}
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))


def groups_of(command: str) -> set[str]:
    """The groups that a command's defaults list names."""
    entries = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    chosen = {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    groups = {key.removeprefix("optional ").split("@")[0] for key in chosen}
    return groups | ({"connector"} if chosen.get("model") else set())  # named by the files of model/


def composed(command: str, *overrides: str):
    """The composed configuration; mandatory values may be missing."""
    module = importlib.import_module(f"skipvision_train.commands.{command}")
    ConfigStore.instance().store(name=f"{command}_schema", node=module.Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, overrides=list(overrides))
    assert OmegaConf.get_type(cfg) is module.Config
    return cfg


def test_all_files_are_found():
    # The number is here so that a glob that finds too little fails; adjust it when a file is added.
    assert len(FILES) == 155
    assert set(COMMANDS) <= set(map(cli.module_name, cli.COMMANDS))
    assert "train" in COMMANDS


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_composes(file):
    if file.parent.name == "":
        composed(file.stem)
        return
    group, choice = file.parts[0], "/".join(file.with_suffix("").parts[1:])
    users = [command for command in COMMANDS if group in groups_of(command)]
    assert users, f"no command's defaults name the group {group}"
    found = False
    for command in users:
        cfg = composed(command, f"{GROUP_PATHS.get(group, group)}={choice}")
        found = True
        if command == "train" and group == "experiment":
            validate(OmegaConf.to_object(cfg), 1)
    assert found


def test_experiment_keys_win_over_everything():
    cfg = composed("train", "experiment=cos_dense")
    assert cfg.trainer.output_dir == "outputs/cos_dense"  # its own key, over sv_cos's and over trainer/default's
    assert cfg.plan.method == "dense"  # its own choice of the plan, over sv_cos's
    assert cfg.model.reducer.split == "none"
    assert cfg.deepspeed.stage == 3  # inherited


def test_command_line_wins_over_the_experiment():
    cfg = composed("train", "experiment=sv_cos", "trainer.output_dir=here", "deepspeed=zero2", "stage=pretrain")
    assert cfg.trainer.output_dir == "here"
    assert cfg.deepspeed.stage == 2
    assert cfg.stage.lr.connector == 1e-3


def test_papers_learning_rates():
    pretrain = composed("train", "experiment=cos_pretrain").stage
    assert dict(pretrain.lr) == {"vision": None, "connector": 1e-3, "reducer": None, "llm": None}
    sft = composed("train", "experiment=sv_cos").stage
    assert set(sft.lr.values()) == {1e-5}
    assert (sft.schedule, sft.warmup_ratio, sft.weight_decay) == ("cosine", 0.03, 0.0)


def test_experiments_are_short_and_say_how_to_run():
    for path in (CONF / "experiment").rglob("*.yaml"):
        lines = path.read_text().splitlines()
        assert any("skipvision_train" in line or "skipvision train" in line for line in lines if line.startswith("#"))
        assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 12, path.name


@pytest.mark.parametrize(
    ("spec", "original"),
    [
        (specs.VisionSpec, settings.VisionConfig),
        (specs.TilingSpec, settings.TilingConfig),
        (specs.ReducerSpec, settings.ReducerConfig),
    ],
)
def test_specs_mirror_the_models_configuration(spec, original):
    ours, theirs = dataclasses.asdict(spec()), dataclasses.asdict(original())
    assert list(ours) == list(theirs)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()} == ours


@pytest.mark.parametrize("name", CONNECTORS)
def test_connector_files_hold_every_field_at_its_default(name):
    assert yaml.safe_load((CONF / "connector" / f"{name}.yaml").read_text()) == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in connector_dict(CONNECTORS[name]()).items()
    }
