"""Every row of Skip-Vision's tables is an experiment whose dry run prints the table's tokens and FLOPs.

The expected figures are the paper's, or, where its own formula does not give what it prints, the formula's; the header
of the experiment says why.
"""

from __future__ import annotations

import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from skipvision_train.commands import train
from skipvision_train.config.validate import check_sources
from skipvision_train.errors import ConfigError
from skipvision_train.resources import resource_dir
from skipvision_train.training.run import describe_stage

EXPERIMENTS = resource_dir("conf") / "experiment"

TABLE_2 = {
    "llava": ("576 retained", 100.0, 100),
    "llava_fastv": ("576 retained", 29.4, 30),
    "mqt_llava": ("256 retained", 44.0, 44),
    "llava_tokenpacker": ("144 retained", 24.6, 24),
    "sv_llava_100_156": ("100 retained, 156 local, 2 summary", 25.1, 25),
    "sv_llava_256_316": ("256 retained, 316 local, 2 summary", 60.7, 60),
    "llava_hd": ("5 tiles: 2880 retained", 100.0, 100),
    "sv_llava_hd": ("5 tiles: 576 retained, 576 local, 2 summary", 24.7, 50),
    "cos": ("1296 retained", 100.0, 100),
    "sv_cos": ("272 retained, 256 local (the last one runs the FFN), 2 summary", 26.2, 25),
    "sv_cos_sv_1m": ("272 retained, 256 local (the last one runs the FFN), 2 summary", 26.2, 25),
}
"""Experiment -> tokens, per cent of the dense baseline by the paper's formula, per cent that the paper prints."""

SWITCHES = {0: "", 1: "Merge", 2: "SF", 3: "SF LV", 4: "SF LS", 5: "SF LS LV", 6: "SF FS LS", 7: "SF LS Merge"}
SWITCHES |= {8: "SF FS LS Merge", 9: "SF LS Merge LV", 10: "SF FS LS Merge LV", 11: "SF FS LS Merge LV SK"}


def composed(name: str):
    """The experiment's configuration."""
    ConfigStore.instance().store(name="train_schema", node=train.Config)
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides=[f"experiment={name}"]))


def dry_run(name: str) -> str:
    return describe_stage(composed(name))


def paper_percent(report: str) -> float:
    return float(re.search(r"by Skip-Vision's formula, visual tokens alone: ([\d.]+) % of", report)[1])


def test_every_row_is_there():
    rows = {
        table: sorted(p.stem for p in (EXPERIMENTS / table).glob("*.yaml")) for table in ("table2", "table4", "table6")
    }
    assert rows["table2"] == sorted(TABLE_2)
    models = ("sv_cos", "sv_llava", "sv_llava_hd")
    assert rows["table4"] == sorted([*models, *(f"{model}_no_sk" for model in models)])
    assert rows["table6"] == ["middle_small", "no_skip_kv", "small"]
    table_5 = [path.stem for path in (EXPERIMENTS / "table5").glob("*.yaml")]
    assert sorted(int(name[:2]) for name in table_5) == sorted(SWITCHES)


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name):
    tokens, formula, printed = TABLE_2[name]
    report = dry_run(f"table2/{name}")
    assert re.search(rf"^  {re.escape(tokens)}$", report, re.M)
    assert paper_percent(report) == pytest.approx(formula, abs=0.051)
    if abs(formula - printed) > 1:
        lines = (EXPERIMENTS / f"table2/{name}.yaml").read_text().splitlines()
        header = "".join(line for line in lines if line.startswith("#"))
        assert f"{printed} %" in header
        assert f"{formula} %" in header


@pytest.mark.parametrize("row", SWITCHES)
def test_table_5(row):
    """Each switch means what its legend says, read off the composed model and plan."""
    (path,) = (EXPERIMENTS / "table5").glob(f"{row:02d}_*.yaml")
    cfg, on = composed(f"table5/{path.stem}"), SWITCHES[row].split()
    reducer, plan = cfg.model.reducer, cfg.plan
    assert path.stem == "_".join([f"{row:02d}", *(on or ["cos"])]).lower()
    assert (plan.method == "skip_ffn") is ("SF" in on)
    assert (reducer.summary in ("former", "both")) is ("FS" in on)
    assert (reducer.summary in ("latter", "both")) is ("LS" in on)
    assert (reducer.local_keep == 256) is ("Merge" in on)
    assert reducer.last_local_ffn is ("LV" in on)
    if "SF" in on:
        assert (plan.evict is None) is ("SK" in on)  # by default skipped tokens leave the cache
        assert plan.evict is None or plan.evict == []


def test_tables_4_and_6_differ_in_what_leaves_the_cache():
    def evicted(name: str) -> list[str] | None:
        return composed(name).plan.evict

    for model in ("sv_llava", "sv_llava_hd", "sv_cos"):
        assert evicted(f"table4/{model}") is None
        assert evicted(f"table4/{model}_no_sk") == []
        same = [dry_run(f"table4/{model}{end}") for end in ("", "_no_sk")]
        assert len({paper_percent(report) for report in same}) == 1
    assert [evicted(f"table6/{row}") for row in ("no_skip_kv", "small", "middle_small")] == [
        [],
        ["skipped"],
        ["middle", "skipped"],
    ]


def layer(tokens: int, width: int = 4096, ffn: int = 14336) -> int:
    """Skip-Vision's formula for a layer in which all tokens run everything."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * ffn


@pytest.mark.parametrize(
    ("name", "tokens", "share"),
    [
        ("figure11/cos_fastv", "1296 retained", (3 * layer(1296) + 29 * layer(324)) / (32 * layer(1296))),
        (
            "figure11/cos_victor",
            "272 retained, 1024 local, 0 summary, 128 registers",
            (4 * layer(1424) + 28 * layer(400)) / (32 * layer(1296)),
        ),
        ("figure11/llava_pool", "144 retained", layer(144) / layer(576)),
        ("cos_336", "336 retained", 1),
    ],
)
def test_what_the_paper_compares_with(name, tokens, share):
    report = dry_run(name)
    assert re.search(rf"^  {re.escape(tokens)}$", report, re.M)
    assert paper_percent(report) == pytest.approx(100 * share, abs=0.051)


def test_rows_are_a_few_lines_and_name_themselves():
    for path in EXPERIMENTS.rglob("*/*.yaml"):
        name = f"{path.parent.name}/{path.stem}"
        text = path.read_text()
        assert f"experiment={name} --dry-run" in text
        assert len([line for line in text.splitlines() if line and line[0] != "#"]) <= 10
        assert yaml.safe_load(text)["trainer"]["output_dir"] == f"outputs/{name}"


def test_the_commands_in_the_headers_give_all_weights(tmp_path):
    """A fine-tuning without its pretraining is refused; what a header names is enough."""
    names = [path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("*.yaml")]
    refused = []
    for name in names:
        cfg, header = composed(name), (EXPERIMENTS / f"{name}.yaml").read_text()
        if cfg.stage.start_from is not None:
            cfg.stage.start_from = str(tmp_path)
            assert (cfg.model.llm, cfg.model.vision_weights) == (None, None), name
        else:
            cfg.model.llm = cfg.model.vision_weights = str(tmp_path)
        trains = cfg.stage.lr.llm is not None and cfg.stage.start_from is None and not cfg.model.from_scratch
        if not trains:
            check_sources(cfg)
            continue
        with pytest.raises(ConfigError, match=r"^model\.connector_weights: null"):
            check_sources(cfg)
        assert "stage.start_from=" in header or "--dry-run" in header, name
        refused.append(name)
    assert {"sv_llava", "sv_cos", "llava_hd", "table2/sv_llava_100_156"} <= set(refused)
    assert {"llava_pretrain", "cos_pretrain", "mqt_pretrain", "token_packer_pretrain"} <= set(names) - set(refused)
    assert not [name for name in refused if name.startswith("sketches")]
