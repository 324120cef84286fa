#!/usr/bin/env bash
# Enter mixtures into PEFT's method comparison (MetaMathQA, Llama-3.2-3B; one GPU of 24 GB, access to the hub):
#   scripts/peft_comparison.sh path/to/a/clone/of/peft [NAME]
# copies studies/peft_comparison/experiments/moa into the clone and has PEFT's own runner train and score each, or NAME alone.
# Its results lie in the clone, in method_comparison/MetaMathQA/results (temporary_results on another branch than main).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
runner=${1:?give the folder of a clone of peft}/method_comparison/MetaMathQA
[ -f "$runner/run.py" ] || { echo "$runner has no run.py: give the folder of a clone of peft" >&2; exit 2; }
command -v moa >/dev/null || { echo "moa is not on the path: source .venv/bin/activate" >&2; exit 2; }
mkdir -p "$runner/experiments/moa"
cp -r "$here/studies/peft_comparison/experiments/moa/." "$runner/experiments/moa"
cd "$runner"
for experiment in experiments/moa/${2:-*}; do
  moa exec -- python run.py -v "$experiment"
done
