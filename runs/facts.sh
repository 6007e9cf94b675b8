#!/usr/bin/env bash
# The main result: memory against dense, three seeds. 12 runs, about 40 minutes on two cores.
# Then compare them: a table, and curves over tokens, FLOPs and time in out/compare.png.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run facts-memory-$seed --seed $seed
    run facts-plus-$seed --mem-gate --qk-norm --seed $seed
    run facts-dense-$seed --ffn dense --seed $seed
    # As long as the memory model takes.
    run facts-dense-long-$seed --ffn dense --seed $seed --max-steps 9000
done
$python train.py --compare out/facts-memory-[123] out/facts-plus-[123] \
    out/facts-dense-[123] out/facts-dense-long-[123]
