#!/usr/bin/env bash
# Fine-tunes BERT on two CPU processes that share each batch; arguments go to examples/finetune_text.py.
# `make demo` first, which sets up the virtual environment; WORKERS and PORT can be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/${VENV:-.venv}/bin:$PATH" OMP_NUM_THREADS=1 GLOG_v=3
msrun --worker_num="${WORKERS:-2}" --local_worker_num="${WORKERS:-2}" --master_port="${PORT:-8118}" --join=True \
    --log_dir=output/msrun examples/finetune_text.py --distributed "$@"
