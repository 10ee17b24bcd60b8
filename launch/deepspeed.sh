#!/usr/bin/env bash
# The deepspeed launcher. On several machines it starts the processes by ssh:
#   HOSTFILE=launch/hostfile launch/deepspeed.sh experiment=sv_cos data.root=/data
# On one machine without HOSTFILE it uses every GPU, or PROCESSES of them.
set -euo pipefail
arguments=()
if [[ -n "${HOSTFILE:-}" ]]; then
  arguments+=(--hostfile "$HOSTFILE")
elif [[ -n "${PROCESSES:-}" ]]; then
  arguments+=(--num_accelerators "$PROCESSES")
fi
exec deepspeed "${arguments[@]}" --master_port "${MASTER_PORT:-29500}" --module skipvision_train train "$@"
