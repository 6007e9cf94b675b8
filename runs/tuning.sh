#!/usr/bin/env bash
# What was tried around the defaults, one seed each. 19 runs, about an hour and 40 minutes on two
# cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# The dense model: its learning rate.
run dense-lr1.5e-3 --ffn dense --learning-rate 1.5e-3 --seed 1
run dense-lr6e-3 --ffn dense --learning-rate 6e-3 --seed 1

# Memory: the table's learning rate, that of the rest, the number of heads.
run memory-vlr1e-2 --value-lr 1e-2 --seed 1
run memory-vlr2e-2 --value-lr 2e-2 --seed 1
run memory-vlr8e-2 --value-lr 8e-2 --seed 1
run memory-lr1.5e-3 --learning-rate 1.5e-3 --seed 1
run memory-lr1.5e-3-vlr2e-2 --learning-rate 1.5e-3 --value-lr 2e-2 --seed 1
run memory-lr6e-3-vlr2e-2 --learning-rate 6e-3 --value-lr 2e-2 --seed 1
run memory-h2 --mem-heads 2 --seed 1

# One half of Memory+ at a time.
run memory-gate-vlr2e-2 --mem-gate --value-lr 2e-2 --seed 1
run memory-qknorm-vlr2e-2 --qk-norm --value-lr 2e-2 --seed 1

# Memory+: the same rates, and two memory layers with one table.
run plus-vlr5e-3 --mem-gate --qk-norm --value-lr 5e-3 --seed 1
run plus-vlr2e-2 --mem-gate --qk-norm --value-lr 2e-2 --seed 1
run plus-vlr8e-2 --mem-gate --qk-norm --value-lr 8e-2 --seed 1
run plus-lr1.5e-3-vlr2e-2 --mem-gate --qk-norm --learning-rate 1.5e-3 --value-lr 2e-2 --seed 1
run plus-lr6e-3-vlr2e-2 --mem-gate --qk-norm --learning-rate 6e-3 --value-lr 2e-2 --seed 1
run plus-two-layers --mem-gate --qk-norm --value-lr 2e-2 --mem-layers 1,2 --mem-topk 16 --seed 1

# The wide dense model of slots.sh: its learning rate.
run facts-dense-128-lr3e-3 --ffn dense --n-embd 128 --seed 1
run facts-dense-128-lr7.5e-4 --ffn dense --n-embd 128 --learning-rate 7.5e-4 --seed 1
