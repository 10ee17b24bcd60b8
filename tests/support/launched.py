"""Training started as users start it: by a script of ``launch/``, in real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


def launch(workspace: Path, run: Path, *overrides: str, processes: int = 2) -> str:
    """Train the experiment ``tiny`` of ``workspace`` in the folder ``run``; its output, shown on failure, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    environment["PROCESSES"] = str(processes)
    words = ["--config-dir", str(workspace / "conf"), "experiment=tiny", f"trainer.output_dir={run}", *overrides]
    done = subprocess.run(
        [str(SCRIPT), *words], cwd=run.parent, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-20000:]
    return done.stdout + done.stderr
