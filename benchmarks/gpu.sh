#!/usr/bin/env bash
# What wants a GPU, in parts of at most ten minutes on one card of 80 GB. Nothing is downloaded; weights are random.
#
#   benchmarks/gpu.sh PART [FOLDER]      PART: backends, train, prefill, generate, evidence
#   RUN=echo benchmarks/gpu.sh train     says only what it would run
#
# Every command writes what it prints to FOLDER/PART-n.txt (outputs/gpu by default) and keeps its own exit status: the
# script goes on to the next and ends with 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?give a part: backends, train, prefill, generate or evidence}
folder=${2:-outputs/gpu}
number=0 failed=0

measure() {
    number=$((number + 1))
    if [ -n "${RUN:-}" ]; then
        $RUN "$@"
        return
    fi
    mkdir -p "$folder"
    timeout 580 "$@" 2>&1 | tee "$folder/$part-$number.txt" || failed=1
}

case $part in
    backends) # correctness: each attention backend against torch's masked attention; where the host waits for the GPU
        measure python -m pytest -q tests/plans/test_on_gpu.py tests/models/test_waits.py tests/models/test_generation_on_gpu.py \
            tests/evaluation/test_commands_on_gpu.py ;;
    train)
        measure python benchmarks/train_step.py --precision bf16_states --layers 16 --accumulation 4 --warmup 3 --repeats 9
        measure python benchmarks/training.py --geometry llava_1_5_7b --layers 8 --records 256 --workers 4 --repeats 3
        measure python benchmarks/training.py --geometry llava_1_5_7b --layers 8 --records 256 --workers 4 --repeats 3 --loop ;;
    prefill)
        measure python benchmarks/prefill.py --geometry llava_1_5_7b --visual 576 2880 --batch 1 8 --warmup 3
        measure python benchmarks/decode.py --geometry llava_1_5_7b --visual 576 2880 --batch 1 8 --warmup 3
        measure python benchmarks/calibration.py --geometry llava_1_5_7b --samples 20 ;;
    generate)
        measure python benchmarks/generate.py --geometry llava_1_5_7b --new 32 512 --batch 1 8 --warmup 2 ;;
    evidence)
        measure python benchmarks/evidence.py --gpu --output "$folder/evidence" ;;
    *)
        echo "$part is no part; give backends, train, prefill, generate or evidence" >&2
        exit 2 ;;
esac
exit $failed
