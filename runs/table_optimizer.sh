#!/usr/bin/env bash
# Does a table need two moments for each number? RowAdam keeps one number per row and no momentum.
# AdamW at five sizes, beside RowAdam in slots.sh and baselines.sh; then other rates of the table
# and of the half-keys; then the tables of other kinds. 53 runs, five hours on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run adamw-n32-$seed $adamw --value-lr 1.6e-1 --mem-n-keys 32 --seed $seed
    run adamw-n64-$seed $adamw --value-lr 1.6e-1 --mem-n-keys 64 --seed $seed
    run adamw-n512-$seed $adamw --value-lr 1.6e-1 --mem-n-keys 512 --seed $seed
    run adamw-n512-6.4e-1-$seed $adamw --value-lr 6.4e-1 --mem-n-keys 512 --seed $seed
done
for seed in 1 2 3 4 5; do
    run adamw-memory-$seed $adamw --value-lr 1.6e-1 --seed $seed
    run adamw-n256-$seed $adamw --value-lr 1.6e-1 --mem-n-keys 256 --seed $seed
done
for seed in 4 5; do
    run facts-n512-$seed --mem-n-keys 512 --seed $seed
    run adamw-n512-6.4e-1-$seed $adamw --value-lr 6.4e-1 --mem-n-keys 512 --seed $seed
done
run adamw-n256-6.4e-1-1 $adamw --value-lr 6.4e-1 --mem-n-keys 256 --seed 1

for seed in 1 2 3; do
    run row-6.4e-1-$seed --value-lr 6.4e-1 --seed $seed
    run row-6.4e-1-keys-1-$seed --value-lr 6.4e-1 --half-key-share 1 --seed $seed
done
run row-1.6e-1-1 --value-lr 1.6e-1 --seed 1
run row-keys-1-1 --half-key-share 1 --seed 1
run row-keys-0.1-1 --half-key-share 0.1 --seed 1
# The same at other sizes.
for rate in 8e-2 1.28; do
    run row-n256-$rate-1 --value-lr $rate --mem-n-keys 256 --seed 1
    run row-n512-$rate-1 --value-lr $rate --mem-n-keys 512 --seed 1
done
run row-n512-keys-1-1 --half-key-share 1 --mem-n-keys 512 --seed 1
run row-n512-keys-0.1-1 --half-key-share 0.1 --mem-n-keys 512 --seed 1

# AdamW with the slower half-keys.
for seed in 1 2; do
    run adamw-keys-$seed --table-optimizer adamw --value-lr 1.6e-1 --seed $seed
done

# The other kinds: AdamW for UltraMem, RowAdam for those that AdamW trains in baselines.sh.
for seed in 1 2 3; do
    run adamw-ultramem-$seed --ffn ultramem $adamw --learning-rate 1.5e-3 --value-lr 1.6e-1 \
        --seed $seed
done
run row-ultramem-1.6e-1-1 --ffn ultramem --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1
run row-hash-1.6e-1-1 --ffn hash --value-lr 1.6e-1 --seed 1
for rate in 1e-2 4e-2; do
    run row-peer-$rate-1 --ffn peer --learning-rate 1.5e-3 --value-lr $rate --seed 1
done
for rate in 6.4e-1 2.56; do
    run row-plus-$rate-1 --mem-gate --qk-norm --learning-rate 1.5e-3 --value-lr $rate --seed 1
done
finish
