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
# gsm8k, code, paper-math, paper-code), MODEL, RM_MODEL (paper presets), RUN (prefix of the run folders), DATA,
# HELDOUT_DATA and TESTS (files instead of downloads), SOURCE=groups (gsm8k: the files are TraceLift-Groups), DEVICE,
# COLD_START=N (gsm8k: training groups of a cold start), INT=1 (also the InT warm start, and tracelift after it),
# SKIP_INSTALL=1 (use the current python3). A stage whose output is complete is skipped, so the same command continues a
# stopped run.
set -euo pipefail
cd "$(dirname "$0")"

python=.venv/bin/python
if [ "${SKIP_INSTALL:-0}" = 1 ]; then
  python=python3
elif [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 2; }
  python3 -m venv .venv
  # torch first and alone: with it in place the other packages do not choose another build
  $python -m pip install -q "$(grep '^torch==' requirements.txt)"
  $python -m pip install -q -r requirements.txt
  touch .venv/installed
fi
case ${1:-all} in
  all) preset=${PRESET:-tiny} ;;
  smoke) preset=smoke ;;
  test)                                           # two halves side by side
    trap 'trap - TERM; kill 0' INT TERM
    status=0
    $python -m pytest -q tests/test_[a-k]*.py tests/test_r[em]*.py &
    $python -m pytest -q tests --ignore-glob='*/test_[a-k]*' --ignore-glob='*/test_r[em]*' || status=$?
    wait $! || status=$?
    exit "$status" ;;
  *) echo "usage: ./run.sh [smoke|test]" >&2; exit 2 ;;
esac

# The recipes: what each stage is told beside its defaults, which are those of the tiny world.
data="" base="" rm="" int="" select="" train="" evaluate=""
modes=${MODES:-exec_only tracelift}
case $preset in
  tiny) ;;
  smoke)
    data="--train 40 --heldout 20"
    base="--sequences 640 --hidden 64 --layers 2 --eval_problems 16"
    rm="--epochs 1 --max_heldout 20"
    int="--problems 8 --group_size 2 --proposals 2 --num_runs 1 --epochs 1"
    train="--steps 2 --problems_per_step 2 --group_size 4"
    evaluate="--problems 16" ;;
  smollm2)                                        # easy problems, a cold start, and those of them that can teach
    sizes="--max_trace_tokens 128 --max_answer_tokens 32 --max_cache_gib 1"
    data="--source gsm8k --max_calculations 3 --train 3600 --heldout 200 --negatives 3"
    base="--model ${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} --cold_start 900 --batch_size 8 --warmup 20
          --cold_learning_rate 3e-4 --eval_problems 200 --max_answer_tokens 32 --max_cache_gib 1"
    rm="--max_groups 600 --epochs 1 --groups_per_batch 4 --learning_rate 5e-5 --warmup 10 --max_heldout 200"
    int="--problems 160 --group_size 4 --proposals 4 --epochs 2 --learning_rate 1e-5 $sizes"
    select="--problems 160 --temperature 0.7 $sizes"
    train="--groups selected/train.jsonl --steps 60 --problems_per_step 4 --temperature 0.7 --learning_rate 2e-5
           --micro_tokens 2048 --save_every 10 $sizes"
    evaluate="--problems 200" ;;
  gsm8k | code)                                   # no learning rate here is tuned
    answer=256 held=200 data="--source gsm8k --train 4000 --heldout 200 --negatives 3"
    if [ "$preset" = code ]; then answer=384 held=80; fi
    if [ "$preset" = code ] || [ "${SOURCE:-}" = groups ]; then data="--source groups --train 4000 --heldout $held"; fi
    base="--model ${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} --eval_problems 80 --max_answer_tokens $answer"
    if [ "${COLD_START:-0}" != 0 ]; then
      base="$base --cold_start $COLD_START --cold_learning_rate 1e-5 --checkpointing 1"
    fi
    sizes="--max_trace_tokens 512 --max_answer_tokens $answer --checkpointing 1"
    rm="--epochs 1 --groups_per_batch 2 --learning_rate 2e-5 --max_heldout 80 --checkpointing 1"
    int="--problems 200 --group_size 4 --proposals 8 --epochs 2 --learning_rate 1e-5 $sizes"
    train="--steps 100 --problems_per_step 8 --learning_rate 1e-6 --warmup 10 $sizes"
    evaluate="--problems $held" ;;
  paper-math | paper-code)                        # the public values, never run here. paper-code trains all weights of
                                                  # the planner (140 GiB at 7B): a card of 80 GB needs a smaller MODEL
    answer=$([ "$preset" = paper-math ] && echo 256 || echo 768)
    sizes="--max_trace_tokens 512 --max_answer_tokens $answer --executor_temperature 0.5 --checkpointing 1"
    data="--source groups --train 100000 --heldout 200"
    base="--model ${MODEL:-Qwen/Qwen2.5-7B} --eval_problems 80 --max_answer_tokens $answer --executor_temperature 0.5"
    rm="--model ${RM_MODEL:-Qwen/Qwen2.5-7B-Instruct} --epochs 3 --groups_per_batch 4 --lora_rank 32 --lora_alpha 64
        --learning_rate 1e-4 --warmup 0.03 --max_heldout 200 --checkpointing 1"
    int="--problems 200 --group_size 4 --temperature 0.7 --proposals 4 --batch_size 64 --learning_rate 1e-6 $sizes"
    train="--steps 600 --group_size 4 --temperature 0.7 --warmup 0 $sizes"
    if [ "$preset" = paper-math ]; then
      [ "${INT:-0}" = 0 ] || { echo "INT=1: paper-math trains an adapter, which starts from the base model" >&2; exit 2; }
      train="$train --problems_per_step 2 --lora_rank 16 --lora_alpha 32 --learning_rate 5e-6"
    else
      train="$train --exec_score hybrid --problems_per_step 8 --loss_aggregation grpo --learning_rate 1e-6"
      modes=${MODES:-tracelift-code}
    fi
    evaluate="--problems 200" ;;
  *) echo "PRESET: there is no $preset; choose tiny, smollm2, gsm8k, code, paper-math or paper-code" >&2; exit 2 ;;
esac
needs_rm=$($python - $modes <<'END'
import sys, tracelift
for mode in sys.argv[1:]:
    if mode not in tracelift.REWARDS:
        sys.exit(f"MODES: there is no {mode}; choose of {' '.join(tracelift.REWARDS)}")
print(any("rm" in tracelift.REWARDS[mode].needs for mode in sys.argv[1:]))
END
) || exit 2

# One domain from its problems to its table.
pipeline() {
  folder=${RUN:-runs/$preset}-$1
  stage() {
    if [ "$1" != data.py ]; then set -- "$@" ${DEVICE:+--device "$DEVICE"}; fi
    echo "$(date +%T)  python $* --run_dir $folder" >&3
    "$python" "$@" --run_dir "$folder" || { echo "$(date +%T)  failed: python $*; see above or $folder/log.txt" >&3; exit 2; }
  }
  case $preset in tiny | smoke) data="$data --task_type $1" ;; esac
  stage data.py $data ${DATA:+--data "$DATA"} ${HELDOUT_DATA:+--heldout_data "$HELDOUT_DATA"} ${TESTS:+--tests "$TESTS"}
  stage executor.py $base
  if [ -n "$select" ]; then stage tracelift.py select $select; fi
  if [ "$needs_rm" = True ] || [ "${INT:-0}" = 1 ]; then stage rm.py $rm; fi
  if [ "${INT:-0}" = 1 ]; then stage tracelift.py int $int; fi
  for seed in ${SEEDS:-0}; do
    for mode in $modes; do
      stage tracelift.py train $train --mode "$mode" --seed "$seed"
    done
    if [ "${INT:-0}" = 1 ]; then
      stage tracelift.py train $train --seed "$seed" --init "$folder/int" --name tracelift-after-InT
    fi
  done
  stage tracelift.py evaluate $evaluate
  "$python" tests/tools/curves.py "$folder" >"$folder/curves.svg"
  printf '\nSuccess and leak over the steps: %s\n' "$folder/curves.svg" >>"$folder/results.md"
}

exec 3>&1
trap 'trap - TERM; kill 0' INT TERM               # what runs in the background too
case $preset in
  tiny | smoke) ;;
  *code) pipeline code; exit ;;
  *) pipeline math; exit ;;
esac
# The tiny world's domains run side by side, a core each: so small a model gains little from a second thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for task in ${TASKS:-math code}; do
  folder=${RUN:-runs/$preset}-$task
  mkdir -p "$folder"
  pipeline "$task" >>"$folder/log.txt" 2>&1 &
done
echo "progress bars and details: tail -f ${RUN:-runs/$preset}-*/log.txt"
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
[ "$status" = 0 ] || exit "$status"
for task in ${TASKS:-math code}; do
  printf '\n== %s\n\n' "$task"
  cat "${RUN:-runs/$preset}-$task/results.md"
done
