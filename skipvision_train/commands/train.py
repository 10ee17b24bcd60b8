"""``skipvision train``: one stage from configuration to a finished model directory."""

from __future__ import annotations

from skipvision_train.config.specs import TrainConfig as Config


def run(cfg: Config) -> None:
    """x."""
    import sys
    sys.stdout.write(repr(cfg) + "\n")
