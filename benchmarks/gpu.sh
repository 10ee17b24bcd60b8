#!/usr/bin/env bash
# What wants a GPU, in parts of at most ten minutes on one card of 80 GB. Nothing is downloaded; weights are random.
#
#   benchmarks/gpu.sh PART [FOLDER]      one of the parts below
#   RUN=echo benchmarks/gpu.sh loop      says only what it would run
#
# A part is one command. What it prints goes to FOLDER/PART.txt too (outputs/gpu by default), at once, so that a part which
# is ended early leaves what it has measured; its exit status is the command's, 124 when time is up.
set -uo pipefail
cd "$(dirname "$0")/.."
parts="backends step train loop prefill decode calibration generate_1 generate_8 evidence_train evidence"
part=${1:?give a part: $parts}
folder=${2:-outputs/gpu}
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=expandable_segments:True # batches of many sizes leave gaps otherwise

measure() {
    if [ -n "${RUN:-}" ]; then
        $RUN "$@"
        return
    fi
    mkdir -p "$folder"
    timeout --kill-after=10 570 "$@" 2>&1 | tee "$folder/$part.txt"
}

training=(python benchmarks/training.py --geometry llava_1_5_7b --layers 8 --records 192 --workers 4 --repeats 3)
rounds=(--warmup 2 --repeats 7)
layouts=(--geometry llava_1_5_7b --visual 576 2880 --batch 1 8)
answers=(python benchmarks/generate.py --geometry llava_1_5_7b --new 32 128 --repeats 3 --warmup 1)
case $part in
    backends) # correctness: each attention backend against torch's masked attention; where the host waits for the GPU
        measure python -m pytest -v tests/plans/test_on_gpu.py tests/models/test_waits.py \
            tests/models/test_generation_on_gpu.py tests/evaluation/test_commands_on_gpu.py ;;
    step) # the largest: some 60 GB
        measure python benchmarks/train_step.py --precision bf16_states --layers 16 --accumulation 4 "${rounds[@]}" ;;
    train) measure "${training[@]}" ;;
    loop) measure "${training[@]}" --loop ;;
    prefill) measure python benchmarks/prefill.py "${layouts[@]}" "${rounds[@]}" ;;
    decode) measure python benchmarks/decode.py "${layouts[@]}" "${rounds[@]}" ;;
    calibration) measure python benchmarks/calibration.py --geometry llava_1_5_7b --samples 20 ;;
    generate_1) measure "${answers[@]}" --batch 1 ;;
    generate_8) measure "${answers[@]}" --batch 8 ;;
    evidence_train) # of one seed; begins where it was ended, as long as the machine and FOLDER are the same
        measure python benchmarks/evidence.py --gpu --seeds 0 --only-train --output "$folder/evidence" ;;
    evidence) # measures what evidence_train has trained
        measure python benchmarks/evidence.py --gpu --seeds 0 --output "$folder/evidence" ;;
    *)
        echo "$part is no part; give one of: $parts" >&2
        exit 2 ;;
esac
