#!/bin/sh
# What only a GPU can show, in at most eight minutes on one with 80 GB; nothing is downloaded, all weights are random.
#   scripts/gpu_check.sh OUTDIR            records into OUTDIR (new or empty), one table last
#   scripts/gpu_check.sh --small OUTDIR    the same parts in small on the CPU
# Needs Python 3.11 or newer with torch, transformers, accelerate, rich and, for the tests, pytest; nothing of vzip need be
# installed. PYTHON=... chooses another interpreter; COMMIT=... names the commit where the copy has no git history.
# Every part has its own time limit and none stops the others; the exit code is 0 if all have succeeded.
set -u
cd "$(dirname "$0")/.." || exit 2
small=
if [ "${1:-}" = --small ]; then small=1; shift; fi
case ${1:-} in -*) echo "$1: no option; --small is the only one." >&2; exit 2 ;; esac
if [ $# -ne 1 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
PYTHON=${PYTHON:-$(command -v python3)}
"$PYTHON" -c '' 2>/dev/null || { echo "PYTHON=$PYTHON: cannot be run; name a Python 3.11 or newer." >&2; exit 2; }
case $1 in /*) out=$1 ;; *) out=$OLDPWD/$1 ;; esac
if [ -e "$out" ] && [ -n "$(ls -A "$out")" ]; then
  echo "$out: is not empty; records are never overwritten, so give a new folder." >&2
  exit 2
fi
if [ -z "$small" ]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "torch of $PYTHON sees no GPU: use --small, or PYTHON=... with a CUDA build." >&2
    exit 2
  }
fi
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONWARNINGS=ignore::FutureWarning COLUMNS=120

# part NAME SECONDS COMMAND...: runs it, shows what it printed, notes how it ended and how long it took.
part() {
  name=$1 limit=$2
  shift 2
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*"
  begun=$(date +%s)
  timeout -k 10 "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  cat "$work/$name.log"
  printf '%s %s %s\n' "$name" "$code" "$(($(date +%s) - begun))" >>"$work/parts"
}

bench() {
  name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m vzip bench "$@" "out=$work/$name"
}

if [ -n "$small" ]; then
  export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  marked='not gpu and not slow' long=600 batch=2 largest=4
  for family in llava llava_next qwen2_5_vl qwen3_vl; do
    "$PYTHON" scripts/make_random_model.py "$family" "$work/$family" >/dev/null 2>&1 || exit 2
  done
  llava=$work/llava next=$work/llava_next larger=$work/llava_next
  qwen2=$work/qwen2_5_vl qwen3=$work/qwen3_vl
  bench_words='weights=random device=cpu repeats=2 warmup=0 num_new_tokens=2'
  qwen_words='weights=random device=cpu repeats=1 warmup=0 num_new_tokens=2' largest_words=$qwen_words
  train_words='weights=random device=cpu repeats=1 warmup=0 batch_size=2 prompt_tokens=32'
  memory_words='device=cpu batch_size=2 prompt_tokens=32 num_new_tokens=4'
else
  marked=gpu long= batch=16 largest=64
  llava=llava15_7b next=llava_next_7b larger=llava_next_13b qwen2=qwen2_5_vl_7b qwen3=qwen3_vl_8b
  bench_words='weights=random device=cuda dtype=bfloat16 repeats=8 warmup=2 num_new_tokens=4'
  qwen_words='weights=random device=cuda dtype=bfloat16 repeats=6 warmup=1 num_new_tokens=4'
  largest_words='weights=random device=cuda dtype=bfloat16 repeats=3 warmup=1 num_new_tokens=4'
  # 256 tokens of text: about what a conversation of LLaVA-1.5's instruction data has beside its image (an assumption).
  train_words='weights=random device=cuda dtype=bfloat16 repeats=4 warmup=1 batch_size=16 prompt_tokens=256'
  memory_words='device=cuda dtype=bfloat16 batch_size=16 prompt_tokens=256 num_new_tokens=64'
fi

# Every test file that has something for a GPU; the project's own options would need a plugin.
# shellcheck disable=SC2046
part tests "${long:-64}" "$PYTHON" -m pytest -o addopts= --import-mode=importlib --strict-markers -q \
  -m "$marked" --junitxml="$work/tests.xml" $(grep -rl 'each_device\|mark\.gpu' tests --include='test_*.py' | sort)
# shellcheck disable=SC2086
{
  bench llava15_7b "${long:-44}" "model=$llava" budget=64tok $bench_words
  # One prompt at a time waits for the host to launch kernels; batches show what the GPU itself saves, and until when.
  bench llava15_7b_batch "${long:-44}" "model=$llava" budget=64tok methods=vanilla,vzip "batch_size=$batch" $bench_words
  bench llava15_7b_batch64 "${long:-54}" "model=$llava" budget=64tok methods=vanilla,vzip "batch_size=$largest" \
    $largest_words
  bench llava_next_7b "${long:-44}" "model=$next" budget=32tok $bench_words
  # Beside the record before: a larger model with few tokens against the smaller one with all.
  bench llava_next_13b "${long:-30}" "model=$larger" budget=32tok methods=vzip $bench_words
  # An image of 1024 visual tokens; both are in one record, qwen_vl.
  bench qwen2_5_vl_7b "${long:-40}" "model=$qwen2" budget=128tok $qwen_words
  bench qwen3_vl_8b "${long:-40}" "model=$qwen3" budget=128tok $qwen_words
  bench train_llava15_7b "${long:-50}" --train "model=$llava" budget=64tok $train_words
  bench memory_llava15_7b "${long:-50}" --memory "model=$llava" budget=64tok $memory_words
}
"$PYTHON" scripts/gpu_records.py "$work" "$out" ${small:+--small}
