"""``skipvision demo``: the whole road on the embedded data set, through the same commands that users call."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipvision_train.errors import ConfigError, SkipVisionError
from skipvision_train.files import write_json

log = logging.getLogger(__name__)


@dataclass
class Stage:
    """One command of the demo."""

    name: str = ""
    """Names the stage in the log, in the list of finished stages and in ``summary.json``."""
    command: list[str] = field(default_factory=list)
    """What follows ``skipvision``."""
    processes: int = 1
    """More than one starts the command under ``torchrun`` with so many processes."""


@dataclass
class Config:
    """Settings of ``skipvision demo``."""

    output: str = "outputs/demo"
    """Everything is written below this folder."""
    stages: list[Stage] = field(default_factory=list)
    """The commands, in order. A finished stage is not run again unless its command, or one before it, changed."""


@dataclass(frozen=True)
class StageResult:
    """What running one stage cost."""

    name: str
    command: str
    seconds: float
    peak_memory_gb: float
    """Largest resident memory of the stage's processes together, in 10^9 bytes, sampled five times a second."""


def run(cfg: Config) -> None:
    """Run the stages that are not finished, then write and print the summary."""
    if not cfg.stages:
        raise ConfigError("stages: the demo has no stages; see conf/demo.yaml")
    output = Path(cfg.output)
    done = output / "stages"
    try:
        done.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror}") from error
    results, fresh = [], False
    for number, stage in enumerate(cfg.stages, 1):
        command = launch_command(stage)
        text = shlex.join(["skipvision", *stage.command])
        marker = done / f"{stage.name}.json"
        finished = None if fresh else _read_marker(marker, text)
        _say(
            f"\n[{number}/{len(cfg.stages)}] {stage.name}" + (f" ({stage.processes} processes)" * (stage.processes > 1))
        )
        _say(f"$ {text}")
        if finished is not None:
            _say(f"finished before, in {finished.seconds:.0f} s")
        else:
            fresh = True
            finished = _run_stage(stage, command, text)
            write_json(marker, finished.__dict__)
        results.append(finished)
    summary = summarise(output, results)
    write_json(output / "summary.json", summary)
    _say(summary_table(summary))


def launch_command(stage: Stage) -> list[str]:
    """The process to start: this interpreter, under torchrun if the stage wants several processes."""
    module = ["-m", "skipvision_train", *stage.command]
    if stage.processes == 1:
        return [sys.executable, *module]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stage.processes}"]
    return [sys.executable, *launcher, *module]


def _read_marker(marker: Path, command: str) -> StageResult | None:
    """The stage's earlier result, if it was finished by the same command."""
    if not marker.is_file():
        return None
    result = StageResult(**json.loads(marker.read_text()))
    return result if result.command == command else None


def _run_stage(stage: Stage, command: list[str], text: str) -> StageResult:
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["CUDA_VISIBLE_DEVICES"] = ""  # it shows the same thing on every machine
    # DeepSpeed looks for ninja on the PATH; it lies beside the interpreter.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    # DeepSpeed compiles an operator at its first start; several compilers at once take more memory than the training.
    environment.setdefault("MAX_JOBS", "1")
    if stage.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // stage.processes)))
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    peak = _PeakMemory(process.pid)
    try:
        status = process.wait()
    finally:
        memory = peak.stop()
    if status != 0:
        raise SkipVisionError(f"stage {stage.name} failed with exit status {status}: {text}")
    return StageResult(stage.name, text, round(time.monotonic() - start, 1), round(memory / 1e9, 2))


class _PeakMemory:
    """Samples the resident memory of a process and its descendants until stopped."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(0.2):
            total = 0
            try:
                root = psutil.Process(self._pid)
                members = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for member in members:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        """End the sampling; the peak in bytes."""
        self._done.set()
        self._thread.join()
        return self._peak


def _losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def summarise(output: Path, results: list[StageResult]) -> dict[str, Any]:
    """Collect the numbers that the stages wrote; nothing is computed anew."""
    evaluation = json.loads((output / "evaluation" / "evaluation.json").read_text())
    skipped = json.loads((output / "evaluation_vskip" / "evaluation.json").read_text())
    plan = json.loads((output / "calibration" / "plan.json").read_text())
    pretrain, sft = _losses(output / "pretrain"), _losses(output / "sft")
    accuracy_per_task = {
        task: {
            "accuracy": row["accuracy"],
            "interval": row["interval"],
            "blind": evaluation["blind"]["tasks"][task]["accuracy"],
            "blind_interval": evaluation["blind"]["tasks"][task]["interval"],
            "vskip": skipped["tasks"][task]["accuracy"],
            "questions": row["total"],
        }
        for task, row in evaluation["tasks"].items()
    }
    above = [t for t, row in accuracy_per_task.items() if row["interval"][0] > row["blind_interval"][1]]
    return {
        "accuracy": evaluation["accuracy"],
        "blind_accuracy": evaluation["blind"]["accuracy"],
        "blind_variant": evaluation["blind"]["variant"],
        "accuracy_per_task": accuracy_per_task,
        "tasks_above_blind": above,
        "vskip_accuracy": skipped["accuracy"],
        "vskip_layers": [i for i, rule in enumerate(plan["rules"]) if rule["no_attention"]],
        "num_layers": plan["num_layers"],
        "first_loss": pretrain[0],
        "last_loss": sft[-1],
        "losses": {"pretrain": [pretrain[0], pretrain[-1]], "sft": [sft[0], sft[-1]]},
        "wall_seconds": round(sum(result.seconds for result in results), 1),
        "peak_memory_gb": max(result.peak_memory_gb for result in results),
        "stages": [result.__dict__ for result in results],
        "report": str(output / "report.html"),
    }


def summary_table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = ["", f"{'task':<12}{'accuracy':>10}{'95 % interval':>18}{'blind':>8}{'V-Skip':>8}"]
    for task, row in summary["accuracy_per_task"].items():
        low, high = row["interval"]
        star = " *" if task in summary["tasks_above_blind"] else ""
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            f"{task:<12}{100 * row['accuracy']:>9.1f}%{interval:>18}{100 * row['blind']:>7.1f}%"
            f"{100 * row['vskip']:>7.1f}%{star}"
        )
    lines.append(
        f"{'mean':<12}{100 * summary['accuracy']:>9.1f}%{'':>18}{100 * summary['blind_accuracy']:>7.1f}%"
        f"{100 * summary['vskip_accuracy']:>7.1f}%"
    )
    lines.append("* above blind beyond both 95 % intervals")
    layers = ", ".join(map(str, summary["vskip_layers"]))
    lines.append(f"V-Skip: no visual attention in layers {layers} of {summary['num_layers']}")
    lines.append(f"loss: {summary['first_loss']:.3f} at the start, {summary['last_loss']:.3f} at the end")
    lines.append(f"time: {summary['wall_seconds']:.0f} s; peak memory: {summary['peak_memory_gb']:.2f} GB")
    lines.append(f"report: {summary['report']}")
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
