#!/usr/bin/env bash
# The deepspeed launcher. On several machines it starts the processes by ssh:
#   HOSTFILE=launch/hostfile launch/deepspeed.sh experiment=sv_cos data.root=/data
# On one machine without HOSTFILE it uses every GPU, or PROCESSES of them.
set -euo pipefail
port="${MASTER_PORT:-29500}"
# With a hostfile the port is one of the first machine in it, which need not be this one.
if [[ -z "${HOSTFILE:-}" ]] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "error: MASTER_PORT: something already listens on port $port of this machine; set MASTER_PORT to a free one" >&2
  exit 1
fi
arguments=(--master_port "$port")
if [[ -n "${HOSTFILE:-}" ]]; then
  if [[ ! -f "$HOSTFILE" ]]; then
    echo "error: HOSTFILE: $HOSTFILE does not exist; lines are 'name slots=8', see launch/hostfile.example" >&2
    exit 1
  fi
  arguments+=(--hostfile "$HOSTFILE")
elif [[ -n "${PROCESSES:-}" ]]; then
  arguments+=(--num_accelerators "$PROCESSES")
fi
exec deepspeed "${arguments[@]}" --module skipvision_train train "$@"
