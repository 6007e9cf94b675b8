#!/usr/bin/env bash
# Does a table need two moments for each number? RowAdam keeps one number per row and no momentum.
# The default table, three seeds, beside those of baselines.sh. 3 runs, 15 minutes on one core.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
table=""

for seed in 1 2 3; do
    run row-memory-$seed --table-optimizer row --value-lr 6.4e-1 --seed $seed
done
finish
