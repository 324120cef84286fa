#!/usr/bin/env bash
# Speed and memory on a CUDA device at the shapes of LLaMA-3.1-8B, random weights. Rows go to OUT.
#   OUT=rows.jsonl scripts/bench_cuda.sh
#   DEVICE=cpu MODEL=smollm2-135m LAYERS=1 PAIRS=1 scripts/bench_cuda.sh   # try it without one
set -euo pipefail
OUT=${OUT:-bench_cuda.jsonl}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-llama-3.1-8b}
PAIRS=${PAIRS:-15}
METHODS=${METHODS:-peft-lora-again,soft-moa-no-prompt,soft-moa,sparse-moa}
NEW_TOKENS=${NEW_TOKENS:-64}
common=(--model "$MODEL" --device "$DEVICE" --dtype bfloat16 --pairs "$PAIRS" --out "$OUT" ${LAYERS:+--layers "$LAYERS"})
over_lora=("${common[@]}" --methods "$METHODS")
over_soft=("${common[@]}" --methods sparse-moa --baseline soft-moa-no-prompt)
small=${LAYERS:+16}  # tokens of a row when it is only tried

for extra in "" --checkpointing; do
  moa bench memory "${over_lora[@]}" --batch-size 1 --length "${small:-512}" $extra
  moa bench train "${over_lora[@]}" --batch-size 1 --length "${small:-2048}" $extra
  moa bench train "${over_lora[@]}" --batch-size 8 --length "${small:-512}" $extra
done
for batch in 1 32; do
  moa bench decode "${over_lora[@]}" --batch-size "$batch" --new-tokens "${small:-$NEW_TOKENS}"
  moa bench decode "${over_soft[@]}" --batch-size "$batch" --new-tokens "${small:-$NEW_TOKENS}"
done
for batch in 1 2 4 8; do
  moa bench train "${over_soft[@]}" --batch-size "$batch" --length "${small:-512}"
done
