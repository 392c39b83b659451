#!/usr/bin/env bash
# TraceLift from an empty machine to a results table.
#
#   ./run.sh            the whole method on the embedded tiny world, math and code (no download)
#   ./run.sh smoke      the same path at toy size, about a minute; its numbers mean nothing
#   ./run.sh test       the tests
#
#   PRESET=gsm8k MODEL=Qwen/Qwen2.5-0.5B-Instruct ./run.sh       a real model on GSM8K, one GPU
#   PRESET=code MODES=exec_only DATA=FILE HELDOUT_DATA=FILE ./run.sh      the same on MBPP or HumanEval lines
#
# Environment: SEEDS ("0 1 2"), MODES ("exec_only tracelift"), TASKS ("math code", tiny world only), PRESET, MODEL,
# RUN (prefix of the run folders), DATA and HELDOUT_DATA (files instead of downloads), INT=1 (also the InT warm start,
# and tracelift after it), SKIP_INSTALL=1 (use the current python3). A stage whose output is complete is skipped, so
# the same command continues a stopped run.
set -euo pipefail
cd "$(dirname "$0")"

command=${1:-all}
case $command in all | smoke | test) ;; *) echo "usage: ./run.sh [smoke|test]" >&2; exit 2 ;; esac

if [ "${SKIP_INSTALL:-0}" = 1 ]; then
  python=python3
else
  python=.venv/bin/python
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "Python 3.10 or newer is needed" >&2; exit 2; }
  if [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
    python3 -m venv .venv
    # torch first and alone: with it in place the other packages do not choose another build
    $python -m pip install -q "$(grep '^torch==' requirements.txt)"
    $python -m pip install -q -r requirements.txt
    touch .venv/installed
  fi
fi

if [ "$command" = test ]; then exec "$python" -m pytest -q tests; fi

for mode in ${MODES:-}; do
  case $mode in
    exec_only | tracelift | tracelift-code | rm_only | uplift_only) ;;
    *) echo "MODES: there is no mode $mode" >&2; exit 2 ;;
  esac
done
for seed in ${SEEDS:-}; do
  case $seed in *[!0-9]*) echo "SEEDS: $seed is no number" >&2; exit 2 ;; esac
done
case ${INT:-0} in 0 | 1) ;; *) echo "INT: $INT is neither 0 nor 1" >&2; exit 2 ;; esac
for task in ${TASKS:-}; do
  case $task in math | code) ;; *) echo "TASKS: $task is neither math nor code" >&2; exit 2 ;; esac
done
preset=${PRESET:-tiny}
if [ "$command" = smoke ]; then preset=smoke; fi
run=${RUN:-runs/$preset}

# One domain from its problems to its table. Stage lines go to the console (fd 3), the rest to stdout.
pipeline() {
  task=$1 folder=$run-$1
  common=(--preset "$preset" --run "$folder")
  stage() {
    echo "$(date +%T)  $folder: $1" >&3
    shift
    "$python" "$@" || { echo "$(date +%T)  $folder: failed in $1" >&3; exit 2; }
  }

  stage "problems, flawed traces, rubrics" data.py "${common[@]}" --task_type "$task" \
    ${DATA:+--data "$DATA"} ${HELDOUT_DATA:+--heldout_data "$HELDOUT_DATA"}
  stage "base model: planner and frozen executor" executor.py "${common[@]}" ${MODEL:+--model "$MODEL"}
  if [[ "${INT:-0}" = 1 || "${MODES:-tracelift}" = *tracelift* || "$MODES" = *rm_only* ]]; then
    stage "rubric reward model" rm.py "${common[@]}"
  fi
  if [ "${INT:-0}" = 1 ]; then
    stage "InT: the planner finds and mends its own first mistakes" tracelift.py int "${common[@]}"
  fi
  for seed in ${SEEDS:-0}; do
    for mode in ${MODES:-exec_only tracelift}; do
      stage "planner trained on $mode, seed $seed" tracelift.py train "${common[@]}" --mode "$mode" --seed "$seed"
    done
    if [ "${INT:-0}" = 1 ]; then
      stage "planner trained on tracelift after InT, seed $seed" tracelift.py train "${common[@]}" --seed "$seed" \
        --init "$folder/int"
    fi
  done
  stage "evaluation" tracelift.py evaluate "${common[@]}"
}

exec 3>&1
if [ "$preset" != tiny ] && [ "$preset" != smoke ]; then
  pipeline "$([ "$preset" = code ] && echo code || echo math)"
  exit
fi
# The tiny world's domains run side by side, with the cores divided between them: so small a model gains little from
# a second thread.
tasks=(${TASKS:-math code})
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ${#tasks[@]} ? cores / ${#tasks[@]} : 1))}
set -m   # a process group for each domain, so that stopping this script stops all of it
pids=()
trap 'for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM
for task in "${tasks[@]}"; do
  mkdir -p "$run-$task"
  pipeline "$task" >"$run-$task/log.txt" 2>&1 &
  pids+=($!)
done
echo "progress bars and details: tail -f $run-*/log.txt"
for i in "${!tasks[@]}"; do
  status=0
  wait "${pids[$i]}" || status=$?
  if [ "$status" != 0 ]; then
    echo "failed; the end of $run-${tasks[$i]}/log.txt:" >&2
    tail -n 15 "$run-${tasks[$i]}/log.txt" >&2
    exit "$status"
  fi
done
for task in "${tasks[@]}"; do
  printf '\n== %s\n\n' "$task"
  cat "$run-$task/results.md"
done
if [ "$command" = smoke ]; then
  echo "This was a smoke test: every stage ran, at a size at which the numbers mean nothing."
fi
