"""The tiny stage of the training tests, and programs that stand in for Slurm's."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("training_stage", ROOT / "tests" / "training" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_stage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_stage)
workspace = _stage.workspace

# An epoch has three steps.
CHANGES = ("trainer.per_device_batch=1", "trainer.max_steps=3", "trainer.save_every=2")

SCONTROL = """
case "$1" in
  show) echo "$3" | tr ',' '\\n' ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
  *) echo "scontrol: $1 is unknown" >&2; exit 1 ;;
esac
"""

# As the real one: the command once per node, signals are passed on to every task, and with SLURM_KILL_BAD_EXIT a task
# that fails ends the others. All nodes are this machine.
SRUN = """
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
pass() { kill "-$1" "${tasks[@]}" 2>/dev/null || true; }
trap 'pass USR1' USR1
trap 'pass TERM' TERM
worst=0
for task in "${tasks[@]}"; do
  while :; do
    status=0
    wait "$task" || status=$?
    kill -0 "$task" 2>/dev/null || break
  done
  if ((status > worst)); then
    worst=$status
    [[ "${SLURM_KILL_BAD_EXIT:-0}" == 0 ]] || pass TERM
  fi
done
exit "$worst"
"""


def stub(folder: Path, name: str, text: str) -> None:
    """A program of the name in the folder."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def port() -> str:
    """A free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def environment(port, monkeypatch) -> dict[str, str]:
    """Of a launch script: nothing of another launcher, this interpreter's programs first."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "NODES", "NODE_RANK", "HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PROCESSES": "2", "MASTER_PORT": port}


@pytest.fixture
def slurm(environment, tmp_path) -> dict[str, str]:
    """Environment of a batch job on one node with two GPUs; what was queued again is in ``requeued``."""
    programs = tmp_path / "slurm"
    programs.mkdir()
    stub(programs, "scontrol", SCONTROL)
    stub(programs, "srun", SRUN)
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    # Where Slurm keeps its copy of the batch script has no other scripts beside it.
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "slurm_script").write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    return environment | {
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }


@pytest.fixture
def arguments(workspace):
    """The overrides of a tiny run in a folder."""

    def make(run: Path, *overrides: str) -> list[str]:
        stage = ["--config-dir", str(workspace / "conf"), "experiment=tiny"]
        return [*stage, f"trainer.output_dir={run}", *CHANGES, *overrides]

    return make
