#!/usr/bin/env bash
# Install SGLang for CPUs into its own virtual environment. usage: install.sh VENV
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp="$venv/.agentrl-sglang-rig"

# A half-finished install must not look like a finished one: the stamp is written last.
rm -f "$stamp"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 -r "$here/requirements.txt"
# --no-deps: their own requirements name CUDA builds of torch, triton and the kernels.
"$venv/bin/pip" install --quiet --no-deps sglang==0.5.23 torchvision==0.28.0 xgrammar==0.2.7 timm==1.0.25
"$venv/bin/python" "$here/patch_cpu.py"
touch "$stamp"
