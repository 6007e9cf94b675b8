#!/usr/bin/env bash
# Does a table in bfloat16 learn as well as one in float32? Memory+, three seeds. 6 runs. A step of
# the bfloat16 table is slow on a CPU, so this takes half an hour or more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
table=""

for seed in 1 2 3; do
    run facts-plus-6.4e-1-$seed --mem-gate --qk-norm --learning-rate 1.5e-3 --value-lr 6.4e-1 \
        --seed $seed
    run facts-bf16-$seed --mem-gate --qk-norm --learning-rate 1.5e-3 --value-lr 6.4e-1 \
        --mem-dtype bfloat16 --seed $seed
done
finish
