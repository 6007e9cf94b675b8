#!/usr/bin/env bash
# What of Adam does a table need? AdamW without momentum, and SparseAdam: only rows that are read
# move, moments and all. Two sizes, seed 1, several rates of the table.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

adam0="--table-optimizer adam0"
lazy="--table-optimizer lazy --half-key-share 1"
for rate in 4e-2 1.6e-1 6.4e-1; do
    run adam0-$rate-1 $adam0 --value-lr $rate --seed 1
    run lazy-$rate-1 $lazy --value-lr $rate --seed 1
done
for rate in 1.6e-1 6.4e-1; do
    run adam0-n512-$rate-1 $adam0 --value-lr $rate --mem-n-keys 512 --seed 1
    run lazy-n512-$rate-1 $lazy --value-lr $rate --mem-n-keys 512 --seed 1
done
finish
