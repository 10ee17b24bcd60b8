"""``skipvision train``: one stage from its configuration to a finished model directory."""

from __future__ import annotations

from skipvision_train.config.specs import TrainConfig as Config

__all__ = ["Config", "run"]


def run(cfg: Config) -> None:
    """Train the stage, or with ``dry_run`` print what it would do."""
    from skipvision_train.training.run import describe_stage, run_stage, write_out

    if cfg.dry_run:
        write_out(describe_stage(cfg))
    else:
        run_stage(cfg)
