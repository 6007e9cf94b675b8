#!/usr/bin/env bash
# What was tried around the default, one seed each. 5 runs, about 15 minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# Half as many heads, with as many reads and with half of them.
run variant-h2-k64 --mem-heads 2 --mem-topk 64 --seed 1
run variant-h2 --mem-heads 2 --seed 1

# One half of Memory+ at a time.
run variant-gate --mem-gate --seed 1
run variant-qknorm --qk-norm --seed 1

# Two memory layers that share a table, with as many reads in all.
run variant-two-layers --mem-layers 1,2 --mem-topk 16 --seed 1
finish
