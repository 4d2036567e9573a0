#!/usr/bin/env bash
# Serve a model with the rig's SGLang. usage: serve.sh VENV MODEL_DIR PORT [sglang flags]
set -euo pipefail
venv=${1:?usage: serve.sh VENV MODEL_DIR PORT [flags]} model=${2:?MODEL_DIR} port=${3:?PORT}
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export PYTHONPATH="$here/shim"              # replaces any: the repository's own packages must not leak in either
export SGLANG_USE_CPU_ENGINE=1 CUDA_VISIBLE_DEVICES=
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # several processes on shared cores collapse with more
# A request aborted while it waits in the queue returns only what was forwarded to the HTTP process: forward every token.
export SGLANG_FORCE_STREAM_INTERVAL=1

exec "$venv/bin/python" -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$port" \
  --device cpu --attention-backend torch_native --dtype float32 \
  --max-total-tokens 65536 --max-running-requests 64 "$@"
