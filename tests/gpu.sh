#!/usr/bin/env bash
# What a GPU has to say about this repository: is it right there, how fast, how much memory. In parts of at most eight
# minutes each; no network, no file beside the repository. Without a card of 80 GB some parts take smaller sizes.
#
#   tests/gpu.sh all                       versions kernels decoding step tests compile, one by one
#   tests/gpu.sh PART ...                  only these
#   tests/gpu.sh step MODEL_FOLDER         the training step of a model on disk instead of a random one
#   tests/gpu.sh dry all | dry PART ...    the same paths at toy size on a CPU; the numbers mean nothing
#
# Numbers go to tests/results/gpu.json (dry: runs/gpu/dry.json) as they come, each part with the card, driver, versions,
# date and command. Python is that of .venv, which ./run.sh makes; SKIP_INSTALL=1: the current python3.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
if [ "${SKIP_INSTALL:-0}" = 1 ]; then python=python3; fi
command -v "$python" >/dev/null ||
  { echo "gpu.sh: there is no .venv; ./run.sh makes it, or set SKIP_INSTALL=1" >&2; exit 2; }
export HF_HUB_OFFLINE=1
exec "$python" tests/tools/gpu.py "$@"
