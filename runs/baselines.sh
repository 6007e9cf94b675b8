#!/usr/bin/env bash
# The main result: memory against dense models and against its rivals, each at the best of its rates
# (tune.sh). Three seeds; dense, memory and the mixture of experts five. 41 runs, about two hours on
# two cores. Then compare them: a table, and curves over tokens, FLOPs and time in out/compare.png.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3 4 5; do
    run facts-dense-$seed --ffn dense --seed $seed
    run facts-memory-$seed --seed $seed
    run facts-moe-$seed --ffn moe --seed $seed
    # Four times the slots.
    run facts-n256-$seed --mem-n-keys 256 --seed $seed
done
for seed in 1 2 3; do
    run facts-hash-$seed --ffn hash $adamw --value-lr 4e-2 --seed $seed
    run facts-peer-$seed --ffn peer $adamw --learning-rate 1.5e-3 --value-lr 1e-2 --seed $seed
    run facts-ultramem-$seed --ffn ultramem --learning-rate 1.5e-3 --value-lr 6.4e-1 --seed $seed
    run facts-plus-$seed --mem-gate --qk-norm $adamw --learning-rate 1.5e-3 --value-lr 2.56 \
        --seed $seed
    # Dense models of twice and of four times the FLOPs.
    run facts-dense2-$seed --ffn dense --n-embd 96 --seed $seed
    run facts-dense4-$seed --ffn dense --n-embd 144 --learning-rate 1.5e-3 --seed $seed
    # As long as the memory model takes.
    run facts-dense-long-$seed --ffn dense --seed $seed --max-steps 7850
done
finish
$python train.py --compare out/facts-dense-[123] out/facts-dense2-[123] out/facts-dense4-[123] \
    out/facts-moe-[123] out/facts-hash-[123] out/facts-peer-[123] out/facts-memory-[123]
