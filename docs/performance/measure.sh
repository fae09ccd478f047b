#!/bin/bash
# Measures the cases of docs/performance.md on this machine's GPU: measure.sh OUT.json [case ...]   (all without names)
# Each case is one process, a minute or two with compilation; A and B are the works that the page describes.
set -u
out=$1; shift
A="experiment=voice_reference_22b model.weights=random adapter.dropout=0 optim=adamw"
B="experiment=talking_head_22b model.weights=random mode=t2av"
RESIDENT="memory.keep_everything=0 memory.stream_blocks=0 memory.offload_inputs=false"
declare -A cases=(
  [A_bf16]="$A memory=auto memory.budget_gib=40 bench.baseline=true"
  [A_bf16_recompute]="$A memory=recompute"
  [A_bf16_launched]="$A memory=recompute memory.graphs=false"
  [A_bf16_12gib]="$A memory=auto memory.budget_gib=12"
  [A_bf16_80gib]="$A memory=auto memory.budget_gib=80"
  [A_bf16_140gib]="$A memory=auto memory.budget_gib=138"
  [A_int8]="$A memory=int8 memory.keep=inputs $RESIDENT"
  [A_int8_22gib]="$A memory=int8 memory.budget_gib=22"
  [A_int8_12gib]="$A memory=int8 memory.budget_gib=12"
  [A_int8_8gib]="$A memory=int8 memory.budget_gib=8"
  [A_int8_6gib]="$A memory=int8 optim=adamw8bit memory.budget_gib=6"
  [A_int4]="$A memory=int8 memory.quantize=int4 memory.keep=inputs $RESIDENT"
  [A_fp8]="$A memory=fp8 memory.keep=inputs $RESIDENT"
  [A_fp8_140gib]="$A memory=fp8 memory.budget_gib=138"
  [A_fp8_22gib]="$A memory=fp8 memory.quantize=float8 memory.budget_gib=22"
  [A_fp8_12gib]="$A memory=fp8 memory.budget_gib=12"
  [A_fp8_12gib_inputs]="$A memory=fp8 memory.budget_gib=12 memory.offload_inputs=false"
  [A_fp8_8gib]="$A memory=fp8 memory.budget_gib=8"
  [A_fp8_8gib_inputs]="$A memory=fp8 memory.budget_gib=8 memory.offload_inputs=false"
  [A_int8mm_22gib]="$A memory=int8 memory.compute=int8 memory.budget_gib=22"
  [A_dropout]="$A adapter.dropout=0.05 memory=recompute"
  [B_bf16]="$B memory=auto memory.budget_gib=54.7 bench.baseline=true"
  [B_bf16_recompute]="$B memory=recompute"
  [B_bf16_attention]="$B memory=auto memory.keep=attention $RESIDENT"
  [B_int8_30gib]="$B memory=int8 memory.budget_gib=30"
  [B_int8_20gib]="$B memory=int8 memory.budget_gib=20"
  [B_fp8_22gib]="$B memory=fp8 memory.budget_gib=22"
  [B_fp8_16gib]="$B memory=fp8 memory.budget_gib=16"
  [B_int8_16gib]="$B memory=int8 memory.budget_gib=16"
)
# shellcheck disable=SC2046  # names of cases are single words
[ $# -gt 0 ] || set -- $(printf '%s\n' "${!cases[@]}" | sort)
for name in "$@"; do
  echo "== $name" >&2
  # shellcheck disable=SC2086  # a case is several words
  python3 -W ignore -m ltx_train bench ${cases[$name]} bench.case="$name" bench.out="$out" bench.warmup=4 || echo "$name failed" >&2
done
