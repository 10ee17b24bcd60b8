"""``skipvision report``: one HTML page about finished runs, evaluations and calibrations."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from skipvision_train.errors import ConfigError

if TYPE_CHECKING:
    from skipvision_train.evaluation.results import EvaluationResult

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision report``."""

    output: str = "???"
    """The HTML file to write."""
    evaluations: list[str] = field(default_factory=list)
    """``evaluation.json`` files, or their folders. The first is the model's; the others are set beside it, each under
    the name of its plan."""
    runs: list[str] = field(default_factory=list)
    """Folders of training stages, whose ``metrics.jsonl`` gives the loss curves."""
    vig: list[str] = field(default_factory=list)
    """``vig.json`` files of calibrations, or their folders."""
    data_root: str | None = None
    """Directory that the evaluations' image paths are relative to; null: they are usable as they stand."""
    examples: int = 12
    """Held-out questions shown with their images; 0 shows none."""
    title: str = "Skip-Vision"
    """Heading of the page."""


def run(cfg: Config) -> None:
    """Read the results, render the page, write it."""
    from skipvision_train.analysis.report import ReportInputs, read_metrics, read_profile, render_report
    from skipvision_train.data.images import load_image
    from skipvision_train.evaluation.results import EvaluationResult

    if not cfg.evaluations:
        raise ConfigError("evaluations: needs at least one evaluation.json")
    if cfg.examples < 0:
        raise ConfigError(f"examples: {cfg.examples} is negative")
    own, *others = [EvaluationResult.load(_file(path, "evaluation.json")) for path in cfg.evaluations]
    profiles = [_file(path, "vig.json") for path in cfg.vig]
    inputs = ReportInputs(
        title=cfg.title,
        losses={Path(run_dir).name: read_metrics(Path(run_dir) / "metrics.jsonl") for run_dir in cfg.runs},
        evaluation=own,
        others=_named(others),
        profiles={_profile_name(path, profiles): read_profile(path) for path in profiles},
        examples=cfg.examples,
    )
    root = Path(cfg.data_root or ".")
    html = render_report(inputs, lambda path: load_image(root / path, "of the report"))
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(output)
    log.info("wrote %s (%.1f MB)", output, output.stat().st_size / 1e6)


def _file(path: str, name: str) -> Path:
    """``path``, or the file of that name in it if it is a folder."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def _named(results: list[EvaluationResult]) -> dict[str, EvaluationResult]:
    """By plan name; a name that occurs again is numbered."""
    named: dict[str, EvaluationResult] = {}
    for result in results:
        name, number = result.plan.name, 2
        while name in named:
            name, number = f"{result.plan.name} ({number})", number + 1
        named[name] = result
    return named


def _profile_name(path: Path, paths: list[Path]) -> str:
    """The calibration's folder, or the whole path where two folders are called the same."""
    same = [other for other in paths if other.parent.name == path.parent.name]
    return path.parent.name if len(same) == 1 and path.parent.name else str(path)
