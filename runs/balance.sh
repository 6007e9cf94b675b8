#!/usr/bin/env bash
# Does a table of 262,144 slots, of which a step reads a tenth, gain from a loss that keeps its
# half-keys used equally? Without it and with one weight, three seeds; another weight on seed 1.
# 7 runs, of which slots.sh has 3. An hour on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run facts-n512-$seed --mem-n-keys 512 --seed $seed
    run balance-1e-2-$seed --mem-n-keys 512 --mem-balance 1e-2 --seed $seed
done
run balance-1e-1-1 --mem-n-keys 512 --mem-balance 1e-1 --seed 1
finish
