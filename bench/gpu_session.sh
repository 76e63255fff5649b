#!/usr/bin/env bash
# Everything that a GPU is to be asked, in under nine minutes, three more with NANOCHAT (all but decode-kernel, compare
# and generate took 447 s together on an H200): every attention kernel against the reference, small and real shapes;
# attention in TFLOP/s; the training step at depth 12 and 20, in fp8, with cuDNN; decoding, by XLA and by the kernel; a
# whole pipeline; and, given its checkout, the reference's own training and generation.
#
#     bench/gpu_session.sh [FOLDER]        # $OUT, or gpu_session/: gpu_session.json, .md, .log
#
# Each part is a command with a time limit of its own, so that one that hangs does not cost the others. What is slow or
# new comes last; parts for which no time is left are said to be missing. Exit status 1 where a part failed, took too
# long or found a kernel wrong. In the environment:
#
#     PYTHON      python with this project's requirements (python3)
#     LIMIT       seconds for all parts together (520; 200 more with NANOCHAT)
#     EXTRA=1     also the step with other attention, in float32, with --remat, with other XLA flags, and by parts, and
#                 decoding whose loop is one CUDA graph: 400 s more
#     PARTS       names of parts, where not all are wanted ("attention-real decode")
#     ROWS_20     rows that depth 20 is tried with, the first that fit ("32 16 8"; 32 need more than 80 GB to be fast)
#     CHECKED     attention that is checked and timed ("cudnn pallas mosaic")
#     FLOAT32     attention that is checked in float32 ("pallas")
#     IMPLS       attention that the step is also measured with, with EXTRA ("pallas")
#     NANOCHAT, NANOCHAT_PYTHON  checkout of karpathy/nanochat, python of its environment
#     REHEARSE=1  the same commands on a CPU with tiny shapes
set -u
cd "$(dirname "$0")/.."
FOLDER=$(mkdir -p "${1:-${OUT:-gpu_session}}" && cd "${1:-${OUT:-gpu_session}}" && pwd)
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + ${LIMIT:-$((520 + 400 * ${EXTRA:-0} + ${NANOCHAT:+200}+0))}))
PIECES=$(mktemp -d)
LOG=$FOLDER/gpu_session.log
trap 'rm -rf "$PIECES"' EXIT
: >"$LOG"

CHECKED=${CHECKED:-cudnn pallas mosaic}
SMALL=() COMPARE=(--device cuda --depth 12 --seq-len 2048 --batch 32 --vocab-size 32768 --rounds 4 --steps 3)
GENERATE=(--device cuda --depth 12 --seq-len 2048 --vocab-size 32768 --rounds 3 --what batch-1 batch-16 prefill)
PATIENCE=1
if [ -n "${REHEARSE:-}" ]; then
    export JAX_PLATFORMS=cpu
    PATIENCE=10 # a CPU may have other things to do
    SMALL=(--model.depth 2 --model.aspect-ratio 64 --model.head-dim 64 --model.sequence-len 256 --model.n-kv-head 1
        --tokenizer.vocab-size 512 --base.total-batch-size 1024 --base.device-batch-size 2 --repeat 1 --rows 1)
    CHECKED="reference pallas_interpreted" CUDNN=reference
    COMPARE=(--depth 2 --seq-len 128 --batch 2 --vocab-size 512 --rounds 1 --steps 1)
    GENERATE=(--depth 2 --vocab-size 512 --rounds 1 --what batch-1)
fi

# part NAME LIMIT COMMAND...: runs it for LIMIT seconds at most; its last line on stdout and how it ended are kept.
part() {
    local name=$1 limit=$((PATIENCE * $2)) left=$((DEADLINE - SECONDS)) start=$SECONDS status
    shift 2
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    if ((left < 5)); then
        echo "$name: no time left" | tee -a "$LOG" >&2
        echo "missing 0" >"$PIECES/$name.status"
        return 1
    fi
    printf '\n== %s: %s\n' "$name" "$*" >>"$LOG"
    timeout -k 5 $((limit < left ? limit : left)) "$@" </dev/null >"$PIECES/$name.out" 2>>"$LOG"
    status=$?
    echo "$status $((SECONDS - start))" >"$PIECES/$name.status"
    echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$LOG" >&2
    return $status
}

# ours NAME LIMIT WHAT OPTIONS...: a part that is one of our measurements.
ours() {
    local name=$1 limit=$2 what=$3
    shift 3
    part "$name" "$limit" "$PYTHON" -m nanochat_jax bench "$what" --json "$@" "${SMALL[@]}"
}

# step NAME LIMIT DEPTH "ROWS..." OPTIONS...: a training step, with the first of ROWS that fits.
step() {
    local name=$1 limit=$2 depth=$3 rows
    local sizes=$4
    shift 4
    for rows in $sizes; do
        ours "$name" "$limit" train --experiment "experiments/d$depth.py" --compute-dtype bfloat16 --repeat 5 \
            --base.total-batch-size 262144 --base.device-batch-size "$rows" "$@" && return
        grep -q RESOURCE_EXHAUSTED <(tail -n 100 "$LOG") || return
    done
}

GPU=(--experiment experiments/d12.py --compute-dtype bfloat16)
# shellcheck disable=SC2206  # words
IMPLEMENTATIONS=(--impls $CHECKED)
ours attention-real 100 attention "${GPU[@]}" --model.depth 24 --rows 16 "${IMPLEMENTATIONS[@]}"
step train-12 80 12 "64 32 16" --step-only
step train-20 110 20 "${ROWS_20:-32 16 8}" --step-only
part pipeline 170 bash -c '"$0" run_speedrun.py --experiment experiments/smoke.py --workdir "$1" --model.head-dim 64 \
    --compute-dtype bfloat16 >&2 && printf "{\"pipeline\": \"%s\"}\n" "$(ls "$1" | tr "\n" " ")"' "$PYTHON" "$PIECES/run"
step train-20-fp8 120 20 "16 8" --step-only --fp8
ours decode 60 decode "${GPU[@]}" --repeat 5 --step-only
ours decode-kernel 60 decode "${GPU[@]}" --repeat 5 --step-only --attention pallas
ours attention-grouped 40 attention "${GPU[@]}" --model.depth 8 --model.n-kv-head 2 --model.sequence-len 640 --rows 3 \
    --repeat 2 "${IMPLEMENTATIONS[@]}"
ours attention-narrow 40 attention "${GPU[@]}" --model.depth 4 --model.head-dim 64 --model.sequence-len 1000 --rows 2 \
    --repeat 2 "${IMPLEMENTATIONS[@]}"
ours attention-float32 40 attention --experiment experiments/d12.py --compute-dtype float32 --rows 4 --repeat 2 \
    --impls "${FLOAT32:-pallas}"
step train-12-cudnn 70 12 "64 32 16" --step-only --attention "${CUDNN:-cudnn}"
if [ -n "${NANOCHAT:-}" ]; then
    part compare 150 "$PYTHON" bench/compare_nanochat.py --nanochat "$NANOCHAT" \
        --python "${NANOCHAT_PYTHON:-$PYTHON}" --json "${COMPARE[@]}"
    part generate 120 "$PYTHON" bench/compare_decode.py --nanochat "$NANOCHAT" \
        --python "${NANOCHAT_PYTHON:-$PYTHON}" --json "${GENERATE[@]}"
fi
if [ -n "${EXTRA:-}" ]; then
    for impl in ${IMPLS:-pallas}; do
        step "train-12-$impl" 70 12 "64 32 16" --step-only --attention "$impl"
    done
    step train-12-remat 70 12 "64 32 16" --step-only --remat
    ours train-12-float32 90 train --experiment experiments/d12.py --compute-dtype float32 --repeat 3 \
        --base.total-batch-size 65536 --base.device-batch-size 8 --step-only
    XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=+WHILE" \
        ours decode-graph 60 decode "${GPU[@]}" --repeat 5 --step-only --attention pallas
    step profile-12 130 12 "64 32 16"
    number=0
    for flags in xla_gpu_dot_merger_threshold_mb=32 xla_gpu_enable_triton_gemm=true xla_gpu_enable_command_buffer=; do
        number=$((number + 1))
        XLA_FLAGS="${XLA_FLAGS:-} --$flags" step "train-12-flags-$number" 70 12 "64 32 16" --step-only
    done
fi
"$PYTHON" -m bench.gpu_session_report "$PIECES" "$FOLDER"
