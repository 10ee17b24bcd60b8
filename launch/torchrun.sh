#!/usr/bin/env bash
# One process per GPU:
#   PROCESSES=8 launch/torchrun.sh experiment=sv_cos data.root=/data stage.start_from=outputs/cos_pretrain/model
# Several machines: run it on each, with NODES, NODE_RANK and MASTER_ADDR (the machine of NODE_RANK=0) set.
set -euo pipefail
port="${MASTER_PORT:-29500}"
if [[ "${NODE_RANK:-0}" == 0 ]] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "error: MASTER_PORT: something already listens on port $port of this machine; set MASTER_PORT to a free one" >&2
  exit 1
fi
# On a signal torchrun waits this long for the processes to save and stop before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec torchrun \
  --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --nproc_per_node="${PROCESSES:-8}" \
  --nnodes="${NODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="$port" \
  -m skipvision_train train "$@"
