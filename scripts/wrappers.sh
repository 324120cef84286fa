#!/usr/bin/env bash
# Run the tests of wrappers with every optional package, and write docs/results/wrappers.jsonl, the rows of docs/wrappers.md.
#   scripts/wrappers.sh                          # makes .venv-wrappers
#   PYTHON=path/to/python scripts/wrappers.sh    # takes an environment that has everything
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  make setup VENV=.venv-wrappers
  PYTHON=.venv-wrappers/bin/python
  $PYTHON -m pip install --quiet -c constraints.txt deepspeed bitsandbytes torchao
fi
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
$PYTHON -c "import bitsandbytes, deepspeed, torchao"  # a test without its package is skipped
$PYTHON -m pytest -q --rows docs/results/wrappers.jsonl -k "wrapped or refused or func_grad or second or exported or static" \
  tests/mixture/test_{wrappers,compiled,transforms,refusals}.py
