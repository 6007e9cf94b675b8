#!/usr/bin/env bash
# Does a table need two moments for each number? RowAdam keeps one number per row and no momentum.
# The defaults at three sizes, beside the AdamW runs of slots.sh; then other rates of the table and
# of the half-keys. 21 runs, an hour and a half on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
table=""

for seed in 1 2 3 4 5; do
    run row-memory-$seed --seed $seed
done
for seed in 1 2 3; do
    run row-n256-$seed --mem-n-keys 256 --seed $seed
done
for seed in 1 2; do
    run row-n512-$seed --mem-n-keys 512 --seed $seed
done

for seed in 1 2 3; do
    run row-6.4e-1-$seed --value-lr 6.4e-1 --seed $seed
    run row-6.4e-1-keys-1-$seed --value-lr 6.4e-1 --half-key-share 1 --seed $seed
done
run row-1.6e-1-1 --value-lr 1.6e-1 --seed 1
run row-keys-1-1 --half-key-share 1 --seed 1
run row-keys-0.1-1 --half-key-share 0.1 --seed 1

# AdamW with the slower half-keys.
for seed in 1 2; do
    run adamw-keys-$seed --table-optimizer adamw --value-lr 1.6e-1 --seed $seed
done
finish
