#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: the tests marked `gpu`, then the table of bounds in bfloat16, eager and
# compiled. Writes gpu_tests.txt and gpu_bounds.json to the folder given, by default the current one.
set -uo pipefail
out=$(realpath "${1:-.}")
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # tests/conftest.py hides the devices unless this is set
python -c "import torch; assert torch.cuda.is_available(), 'there is no CUDA device'" || exit 2
timeout 150 python -m pytest -q -m gpu tests/gpu 2>&1 | tee "$out/gpu_tests.txt"
tests=${PIPESTATUS[0]}
timeout 420 python benchmarks/bench.py --device cuda --minutes 6 --json "$out/gpu_bounds.json"
bounds=$?
exit $((tests > bounds ? tests : bounds))
