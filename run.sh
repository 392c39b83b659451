#!/usr/bin/env bash
# TraceLift from an empty machine to a results table.
#
#   ./run.sh            the whole method on the embedded tiny world, math and code (no download)
#   ./run.sh smoke      the same path at toy size, about a minute; its numbers mean nothing
#   ./run.sh test       the tests
#
#   PRESET=gsm8k MODEL=Qwen/Qwen2.5-0.5B-Instruct ./run.sh       a real model on GSM8K, one GPU
#
# Environment: SEEDS ("0 1 2"), MODES ("exec_only tracelift"), TASKS ("math code", tiny world only), PRESET, MODEL,
# RUN (prefix of the run folders), DATA and HELDOUT_DATA (files instead of downloads), SKIP_INSTALL=1 (use the current
# python3). A stage whose output is complete is skipped, so the same command continues a stopped run.
set -euo pipefail
cd "$(dirname "$0")"

command=${1:-all}
case $command in all | smoke | test) ;; *) echo "usage: ./run.sh [smoke|test]" >&2; exit 2 ;; esac

if [ "${SKIP_INSTALL:-0}" = 1 ]; then
  python=python3
else
  python=.venv/bin/python
  if [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
    python3 -m venv .venv
    # torch first and alone: with it in place the other packages do not choose another build
    $python -m pip install -q "$(grep '^torch==' requirements.txt)"
    $python -m pip install -q -r requirements.txt
    touch .venv/installed
  fi
fi

if [ "$command" = test ]; then exec "$python" -m pytest -q tests; fi

preset=${PRESET:-tiny}
[ "$command" = smoke ] && preset=smoke
run=${RUN:-runs/$preset}
[ "$preset" = tiny ] || [ "$preset" = smoke ] && tasks=${TASKS:-math code} || tasks=math

for task in $tasks; do
  folder=$run-$task
  common=(--preset "$preset" --run "$folder")
  say() { printf '\n== %s: %s\n' "$folder" "$1"; }

  say "problems, flawed traces, rubrics"
  "$python" data.py "${common[@]}" --task_type "$task" ${DATA:+--data "$DATA"} ${HELDOUT_DATA:+--heldout_data "$HELDOUT_DATA"}
  say "base model: planner and frozen executor"
  "$python" executor.py "${common[@]}" --task_type "$task" ${MODEL:+--model "$MODEL"}
  say "rubric reward model"
  "$python" rm.py "${common[@]}"
  for seed in ${SEEDS:-0}; do
    for mode in ${MODES:-exec_only tracelift}; do
      say "planner, reward $mode, seed $seed"
      "$python" tracelift.py train "${common[@]}" --mode "$mode" --seed "$seed"
    done
  done
  say "evaluation"
  "$python" tracelift.py evaluate "${common[@]}"
done
[ "$preset" = smoke ] && echo "This was a smoke test: every stage ran, at a size at which the numbers mean nothing."
exit 0
