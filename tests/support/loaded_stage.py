"""A process of a stage; started by a launcher: ``loaded_stage.py CFG AS RESULT``.

``AS`` is ``usual``, or ``fp32`` to load every weight in fp32 whatever the engine makes of it. Every rank writes the
types of the loaded model into the folder ``RESULT``.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import torch

from skipvision_train.training import run


def main():
    cfg, how, result = pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2], Path(sys.argv[3])
    if how == "fp32":
        run.weights_dtype = lambda cfg: torch.float32
    open_model = run.open_model

    def watched(cfg, config):
        model = open_model(cfg, config)
        types = sorted({str(parameter.dtype) for parameter in model.parameters()})
        (result / f"types-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(types))
        return model

    run.open_model = watched
    run.run_stage(cfg)


if __name__ == "__main__":
    main()
