#!/usr/bin/env bash
# One machine, one process per GPU.
#   PROCESSES=8 launch/torchrun.sh experiment=sv_cos data.root=/data stage.start_from=outputs/cos_pretrain/model
# Several machines: run it on each with NODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail
exec torchrun \
  --nproc_per_node="${PROCESSES:-8}" \
  --nnodes="${NODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${MASTER_PORT:-29500}" \
  -m skipvision_train train "$@"
