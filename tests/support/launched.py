"""Training in real processes: as users start it, by a script of ``launch/``, and by a script of a test."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


def _surroundings(**more: str) -> tuple[str, dict[str, str]]:
    """A free port, and the environment of a launcher that finds this interpreter's programs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return port, {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def two_processes(script: str, cfg: Any, how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``tests/support/SCRIPT`` by torchrun in ``folder``, with the pickled ``cfg``, ``how`` and ``folder``."""
    (folder / "cfg.pkl").write_bytes(pickle.dumps(cfg))
    port, environment = _surroundings(PYTHONPATH=str(Path(__file__).parents[2]))
    words = ["--nproc_per_node=2", f"--master_port={port}", str(Path(__file__).parent / script)]
    return subprocess.run(
        ["torchrun", *words, "cfg.pkl", how, str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def launch(workspace: Path, run: Path, *overrides: str, processes: int = 2) -> str:
    """Train the experiment ``tiny`` of ``workspace`` in the folder ``run``; its output, shown on failure, too."""
    port, environment = _surroundings(PROCESSES=str(processes))
    environment["MASTER_PORT"] = port
    words = ["--config-dir", str(workspace / "conf"), "experiment=tiny", f"trainer.output_dir={run}", *overrides]
    done = subprocess.run(
        [str(SCRIPT), *words], cwd=run.parent, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-20000:]
    return done.stdout + done.stderr
