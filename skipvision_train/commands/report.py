"""``skipvision report``: one HTML page about finished runs, evaluations and calibrations."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from skipvision_train.errors import ConfigError, DataError
from skipvision_train.files import write_text

if TYPE_CHECKING:
    from PIL import Image

    from skipvision_train.evaluation.results import EvaluationResult

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision report``."""

    output: str = "???"
    """The HTML file to write."""
    evaluations: list[str] = field(default_factory=list)
    """``evaluation.json`` files, or their folders. The first is the model's; the others are set beside it, each under
    the name of its plan. Without any the page shows training and calibration alone."""
    runs: list[str] = field(default_factory=list)
    """Folders of training stages, whose ``metrics.jsonl`` gives the loss curves."""
    vig: list[str] = field(default_factory=list)
    """Folders of calibrations: of ``vig.json``, and of ``scores*.json``, ``seeds.json``, ``curves.json`` and
    ``transfer.json`` where they are there. The path of a ``vig.json`` shows that file alone."""
    analysis: list[str] = field(default_factory=list)
    """Folders of ``skipvision analyze``, or their ``analysis.json``."""
    bench: list[str] = field(default_factory=list)
    """Folders of ``skipvision bench``, or their ``bench.json``."""
    data_root: str | None = None
    """Directory that the evaluations' image paths are relative to; null: they are usable as they stand."""
    examples: int = 12
    """Held-out questions shown with their images; 0 shows none."""
    title: str = "Skip-Vision"
    """Heading of the page."""


def run(cfg: Config) -> None:
    """Read the results, render the page, write it."""
    from skipvision_train.analysis.analysis_section import read_analysis
    from skipvision_train.analysis.calibration_report import read_calibration
    from skipvision_train.analysis.report import ReportInputs, read_metrics, render_report
    from skipvision_train.data.images import load_image
    from skipvision_train.evaluation.bench_results import BenchResult
    from skipvision_train.evaluation.results import EvaluationResult

    if not (cfg.evaluations or cfg.runs or cfg.vig or cfg.analysis or cfg.bench):
        raise ConfigError("evaluations: nothing to report; give evaluations, runs, vig, analysis or bench")
    if cfg.examples < 0:
        raise ConfigError(f"examples: {cfg.examples} is negative")
    results = [EvaluationResult.load(_file(path, "evaluation.json")) for path in cfg.evaluations]
    inputs = ReportInputs(
        title=cfg.title,
        losses={Path(run_dir).name: read_metrics(Path(run_dir) / "metrics.jsonl") for run_dir in cfg.runs},
        evaluation=results[0] if results else None,
        others=_named(results[1:]),
        calibrations={_folder_name(path, cfg.vig, "vig.json"): read_calibration(path) for path in cfg.vig},
        analyses={_folder_name(path, cfg.analysis, "analysis.json"): read_analysis(path) for path in cfg.analysis},
        benches={_folder_name(path, cfg.bench, "bench.json"): BenchResult.load(path) for path in cfg.bench},
        examples=cfg.examples,
    )
    root = Path(cfg.data_root or ".")

    def image(path: str) -> Image.Image:
        try:
            return load_image(root / path, "of the report")
        except DataError as error:
            if cfg.data_root is None:
                raise DataError(f"{error}; data_root=... says in which folder the evaluation's images lie") from error
            raise

    html = render_report(inputs, image)
    output = Path(cfg.output)
    try:
        write_text(output, html)
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror}") from error
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


def _folder_name(path: str, paths: list[str], file: str) -> str:
    """The folder's name, or the whole path where two folders are called the same."""
    names = [_file(other, file).parent.name for other in paths]
    name = _file(path, file).parent.name
    return name if name and names.count(name) == 1 else path
