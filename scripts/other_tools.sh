#!/usr/bin/env bash
# Have axolotl and ms-swift train a mixture of a tiny model on a CPU:
#   scripts/other_tools.sh                          # makes .venv-tools
#   PYTHON=path/to/python scripts/other_tools.sh    # takes an environment that has both
# Both ask for an older PEFT than this package needs, so they are installed without their dependencies, and those that a
# run on a CPU takes come after.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  test -x .venv-tools/bin/python || python3 -m venv .venv-tools
  PYTHON=.venv-tools/bin/python
  install="$PYTHON -m pip install --quiet --disable-pip-version-check"
  $install torch==2.13.0
  $install peft==0.21.2 transformers==5.16.1 trl==1.9.0 accelerate==1.13.0 datasets==4.8.4 huggingface_hub==1.17.0 \
    gguf filelock typer==0.25.1 rich jinja2 pytest "fsspec<=2026.2.0" \
    addict art colorama einops evaluate fire json_repair mistral-common==1.11.5 modelscope numba posthog==6.7.11 \
    pydantic==2.12.5 python-dotenv schedulefree==1.4.1 scipy sentencepiece tensorboard wandb matplotlib bitsandbytes==0.50.2
  $install --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 ms-swift==4.6.0 triton -e .
fi
export OMP_NUM_THREADS=1 AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
$PYTHON -c "import axolotl, swift"  # a test without its tool is skipped
$PYTHON -m pytest -q -W ignore tests/integrations/test_other_tools.py
