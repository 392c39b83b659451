#!/usr/bin/env bash
# TraceLift from an empty machine to a results table. Prints every command that it runs.
#
#   ./run.sh            the whole method on the embedded tiny world, math and code (no download)
#   ./run.sh smoke      the same path at toy size, about a minute; its numbers mean nothing
#   ./run.sh test       the tests
#
#   PRESET=smollm2 ./run.sh                                      a real model of 135M on GSM8K, hours on two cores
#   PRESET=gsm8k MODEL=Qwen/Qwen2.5-0.5B-Instruct ./run.sh       a real model on GSM8K, one GPU
#   PRESET=code MODES=exec_only DATA=FILE HELDOUT_DATA=FILE ./run.sh      the same on MBPP or HumanEval lines
#
# Environment: SEEDS ("0 1 2"), MODES ("exec_only tracelift"), TASKS ("math code", tiny world), PRESET (tiny, smollm2,
# gsm8k, code, paper-math, paper-code), MODEL, RUN (prefix of the run folders), DATA, HELDOUT_DATA and TESTS (files
# instead of downloads), SOURCE=groups (gsm8k: the files are TraceLift-Groups), DEVICE, COLD_START=N (gsm8k: training
# groups of a cold start, off by default), INT=1 (also the InT warm start, and tracelift after it), SKIP_INSTALL=1 (use
# the current python3). A stage whose output is complete is skipped, so the same command continues a stopped run.
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

if [ "$command" = test ]; then                    # two halves side by side, one thread each
  set -m                                          # else the half in the background would not know Ctrl-C
  half=(tests/test_tracelift.py tests/test_verify.py) log=$(mktemp) status=0
  "$python" -m pytest -q "${half[@]}" >"$log" 2>&1 &
  trap 'kill %1 2>/dev/null || true' EXIT
  "$python" -m pytest -q tests "${half[@]/#/--ignore=}" || status=$?
  wait $! || status=$?
  cat "$log"
  rm "$log"
  exit "$status"
fi

preset=${PRESET:-tiny}
if [ "$command" = smoke ]; then preset=smoke; fi

# The recipes: what each stage is told beside its defaults, which are those of the tiny world.
data="" base="" rm="" int="" select="" train="" evaluate=""
case $preset in
  tiny) ;;
  smoke)
    data="--train 40 --heldout 20"
    base="--sequences 640 --hidden 64 --layers 2 --eval_problems 16"
    rm="--epochs 1 --max_heldout 20"
    int="--problems 8 --group_size 2 --proposals 2 --repeats 1 --epochs 1"
    train="--steps 2 --warmup 1 --problems_per_step 2 --group_size 4"
    evaluate="--problems 16" ;;
  smollm2)                                        # easy problems, a cold start, and those of them that can teach
    sizes="--max_trace_tokens 128 --max_answer_tokens 32 --max_cache_gib 1"
    data="--source gsm8k --max_calculations 3 --train 3600 --heldout 200 --negatives 3"
    base="--model ${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} --cold_start 900 --batch_size 8 --warmup 20
          --cold_learning_rate 3e-4 --eval_problems 200 --max_answer_tokens 32 --max_cache_gib 1"
    rm="--max_groups 600 --epochs 1 --groups_per_batch 4 --learning_rate 5e-5 --warmup 10 --max_heldout 200"
    int="--problems 160 --group_size 4 --proposals 4 --epochs 2 --learning_rate 1e-5 $sizes"
    select="--problems 160 --temperature 0.7 $sizes"
    train="--selected 1 --steps 60 --problems_per_step 4 --temperature 0.7 --learning_rate 2e-5 --micro_tokens 2048
           --save_every 10 $sizes"
    evaluate="--problems 200" ;;
  gsm8k | code)                                   # no learning rate here is tuned
    answer=$([ "$preset" = code ] && echo 384 || echo 256)
    data="--source ${SOURCE:-gsm8k} --train 4000 --heldout 200 --negatives 3"
    if [ "$preset" = code ]; then data="--source groups --task_type code --train 300 --heldout 80"; fi
    base="--model ${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} --eval_problems 80 --max_answer_tokens $answer"
    if [ "${COLD_START:-0}" != 0 ]; then
      base="$base --cold_start $COLD_START --cold_learning_rate 1e-5 --checkpointing 1"
    fi
    rm="--epochs 1 --groups_per_batch 2 --learning_rate 2e-5 --max_heldout 80 --checkpointing 1"
    int="--problems 200 --group_size 4 --proposals 8 --max_trace_tokens 256 --max_answer_tokens $answer
         --epochs 2 --learning_rate 1e-5 --checkpointing 1"
    train="--steps 100 --problems_per_step 8 --learning_rate 1e-6 --warmup 10 --micro_tokens 4096 --checkpointing 1
           --max_trace_tokens 256 --max_answer_tokens $answer"
    evaluate="--problems $([ "$preset" = code ] && echo 80 || echo 200)" ;;
  paper-math | paper-code)                        # the public values, never run here. Of paper-code, which trains all
                                                  # weights of the planner (140 GiB at 7B), a card of 80 GB wants a
                                                  # smaller MODEL
    data="--source groups --task_type ${preset#paper-} --train 100000 --heldout 200"
    base="--model ${MODEL:-Qwen/Qwen2.5-7B-Instruct} --eval_problems 80 --max_answer_tokens 512"
    base="$base --executor_temperature 0.5"
    rm="--epochs 3 --groups_per_batch 2 --lora_rank 32 --lora_alpha 64 --learning_rate 1e-4 --max_heldout 200
        --checkpointing 1"
    int="--problems 200 --group_size 4 --max_trace_tokens 512 --max_answer_tokens 512 --learning_rate 1e-6
         --executor_temperature 0.5 --checkpointing 1"
    train="--steps 600 --group_size 4 --temperature 0.7 --executor_temperature 0.5 --warmup 10 --micro_tokens 4096
           --checkpointing 1 --max_trace_tokens 512 --max_answer_tokens 512"
    if [ "$preset" = paper-math ]; then
      train="$train --mode tracelift --problems_per_step 2 --lora_rank 16 --lora_alpha 32 --learning_rate 5e-6"
    else
      train="$train --mode tracelift-code --exec_score hybrid --problems_per_step 8 --weights grpo --learning_rate 1e-6"
      MODES=${MODES:-tracelift-code}
    fi
    evaluate="--problems 200" ;;
  *) echo "PRESET: there is no $preset; choose tiny, smollm2, gsm8k, code, paper-math or paper-code" >&2; exit 2 ;;
esac

for seed in ${SEEDS:-}; do
  case $seed in *[!0-9]*) echo "SEEDS: $seed is no number" >&2; exit 2 ;; esac
done
case ${INT:-0} in 0 | 1) ;; *) echo "INT: $INT is neither 0 nor 1" >&2; exit 2 ;; esac
if [ "${INT:-0}" = 1 ] && [[ "$train" = *--lora_rank* ]]; then
  echo "INT=1: the planner after InT is trained with all weights, PRESET=$preset trains an adapter" >&2; exit 2
fi
for task in ${TASKS:-}; do
  case $task in math | code) ;; *) echo "TASKS: $task is neither math nor code" >&2; exit 2 ;; esac
done
run=${RUN:-runs/$preset}

# One domain from its problems to its table. Commands go to the console (fd 3) and, with their output, to stdout.
pipeline() {
  folder=$run-$1
  stage() {
    set -- "$@" --run_dir "$folder"
    if [ "$1" != data.py ] && [ -n "${DEVICE:-}" ]; then set -- "$@" --device "$DEVICE"; fi
    echo "$(date +%T)  python $*" >&3
    if [ "${logged:-0}" = 1 ]; then echo "$(date +%T)  python $*"; fi
    local status=0
    "$python" "$@" || status=$?
    if [ "$status" != 0 ]; then echo "$(date +%T)  failed: python $*" >&3; exit "$status"; fi
  }

  case $preset in tiny | smoke) data="$data --task_type $1" ;; esac
  stage data.py $data ${DATA:+--data "$DATA"} ${HELDOUT_DATA:+--heldout_data "$HELDOUT_DATA"} ${TESTS:+--tests "$TESTS"}
  stage executor.py $base
  if [ -n "$select" ]; then
    stage tracelift.py select $select
  fi
  if [ "${INT:-0}" = 1 ] || [ "$needs_rm" = 1 ]; then
    stage rm.py $rm
  fi
  if [ "${INT:-0}" = 1 ]; then
    stage tracelift.py int $int
  fi
  for seed in ${SEEDS:-0}; do
    for mode in ${MODES:-exec_only tracelift}; do
      stage tracelift.py train $train --mode "$mode" --seed "$seed"
    done
    if [ "${INT:-0}" = 1 ]; then
      stage tracelift.py train $train --seed "$seed" --init "$folder/int"
    fi
  done
  stage tracelift.py evaluate $evaluate
}

exec 3>&1
# Before the first stage: a mode that is not there or not for this recipe, a GPU that torch cannot use, Triton that
# cannot start are one line. Says whether a reward model is needed.
needs_rm=$("$python" - "$train" ${MODES:-exec_only tracelift} <<'EOF'
import os, sys
import data, executor, kernels, tracelift
flags, modes = sys.argv[1].split(), sys.argv[2:]
try:
    for mode in modes:
        tracelift.check_train(data.parse_settings(tracelift.TrainSettings, [*flags, "--mode", mode], "MODES"))
    kernels.check(executor.pick_device(os.environ.get("DEVICE", "")))
except (RuntimeError, ValueError, executor.UserError) as error:
    raise SystemExit(f"error: {error}")
print(int(any("rm" in tracelift.REWARDS[mode].needs for mode in modes)))
EOF
) || exit 2
case $preset in
  tiny | smoke) ;;
  *code) pipeline code; exit ;;
  *) pipeline math; exit ;;
esac
# The tiny world's domains run side by side, with the cores divided between them: so small a model gains little from
# a second thread.
tasks=(${TASKS:-math code})
if [ "$(uname)" != Linux ] && [ -z "${TASKS:-}" ]; then
  echo "code is left out: programs are judged on Linux only (TASKS=\"math code\" tries it all the same)"
  tasks=(math)
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ${#tasks[@]} ? cores / ${#tasks[@]} : 1))}
set -m   # a process group for each domain, so that stopping this script stops all of it
pids=()
trap 'for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM
for task in "${tasks[@]}"; do
  mkdir -p "$run-$task"
  logged=1 pipeline "$task" >"$run-$task/log.txt" 2>&1 &
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
