#!/bin/sh
# Tables 1 (7B) and 10 (13B) of arXiv 2412.04467, the training-free rows, on the benchmarks that need no judge.
#   scripts/reproduce_llava15.sh [7b|13b] [more overrides, as eval.limit=500]
# Each line is a command one can type; a run that already has its record is left as it is.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
size=${1:-7b}
[ $# -eq 0 ] || shift
case $size in 7b | 13b) ;; *)
  echo "'$size': must be 7b or 13b" >&2
  exit 2
  ;;
esac
for budget in vanilla 192tok 128tok 64tok; do
  recipe=llava15_${size}_${budget}
  case $budget in vanilla) part=none-full ;; *) part=visionzip-$budget ;; esac
  run=runs/paper_image/$recipe/$part/seed0
  if [ $# -eq 0 ] && [ -f "$run/run.json" ]; then
    echo "$run: done already"
  else
    "$PYTHON" eval.py "+exp=$recipe" "$@"
  fi
  [ $# -gt 0 ] || "$PYTHON" -m vzip compare "$run"
done
