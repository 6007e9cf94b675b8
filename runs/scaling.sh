#!/usr/bin/env bash
# A wider model, or more experts, instead of more slots? Dense models of two more widths, one of
# them narrower, and mixtures of experts as large as the tables of 4,096 and of 65,536 slots. Three
# seeds, and on seed 1 the rates tried for the new widths. 17 runs, about an hour and a half on two
# cores. The other sizes of the picture are runs of slots.sh and baselines.sh.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run facts-dense48-$seed --ffn dense --n-embd 48 --learning-rate 6e-3 --seed $seed
    run facts-dense208-$seed --ffn dense --n-embd 208 --learning-rate 7.5e-4 --seed $seed
    # 64 experts of 32 hidden units, of which a token uses 7; 256 of 128, of which it uses one.
    run facts-moe-n64-$seed --ffn moe --mem-n-keys 64 --moe-experts 64 --seed $seed
    run facts-moe-n256-$seed --ffn moe --mem-n-keys 256 --seed $seed
done
run tune-dense48-1.5e-3 --ffn dense --n-embd 48 --learning-rate 1.5e-3 --seed 1
run tune-dense48-3e-3 --ffn dense --n-embd 48 --learning-rate 3e-3 --seed 1
run tune-dense48-1.2e-2 --ffn dense --n-embd 48 --learning-rate 1.2e-2 --seed 1
run tune-dense208-3.75e-4 --ffn dense --n-embd 208 --learning-rate 3.75e-4 --seed 1
run tune-dense208-1.5e-3 --ffn dense --n-embd 208 --learning-rate 1.5e-3 --seed 1
finish
