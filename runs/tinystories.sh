#!/usr/bin/env bash
# The kinds on all of TinyStories (2 GB to download), three seeds. 15 runs for a GPU, with the rates
# of the preset, which were never tuned. Not run in full yet. Then compare them: loss over tokens,
# FLOPs and time in out/compare.png.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

$python prepare_data.py tinystories
for seed in 1 2 3; do
    run stories-dense-$seed tinystories --ffn dense --seed $seed
    run stories-memory-$seed tinystories --no-mem-gate --no-qk-norm --seed $seed
    run stories-plus-$seed tinystories --seed $seed
    run stories-hash-$seed tinystories --ffn hash --seed $seed
    run stories-moe-$seed tinystories --ffn moe --seed $seed
done
finish
$python train.py --compare out/stories-dense-[123] out/stories-memory-[123] \
    out/stories-plus-[123] out/stories-hash-[123] out/stories-moe-[123]
