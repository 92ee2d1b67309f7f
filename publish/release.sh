#!/usr/bin/env bash
# Make a release and publish it:  publish/release.sh BASE REPO_ID RATIO [options of `loram prune`]
#
#   publish/release.sh meta-llama/Llama-3.1-70B org/Llama-3.1-70B-LoRAM-0.85 0.85 --calibration texts.jsonl --device cuda
#
# Run it again after an interruption: a release that is complete is not made again, and a push goes on where it was.
# WORK=/elsewhere chooses where the release is made; PUSH="--private --tag v1" adds options to the push.
set -euo pipefail

base=$1 repo=$2 ratio=$3
shift 3
work=${WORK:-$PWD}
release=$work/${repo#*/}

loram plan "$base" --pruning-ratio "$ratio"
[ -e "$release/loram.json" ] || loram prune "$base" "$release" --pruning-ratio "$ratio" --quantize "$@"
loram verify "$release"
# shellcheck disable=SC2086  # the options are words
loram push "$release" "$repo" --dry-run ${PUSH:-}
# shellcheck disable=SC2086
loram push "$release" "$repo" ${PUSH:-}
