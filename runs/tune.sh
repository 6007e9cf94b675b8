#!/usr/bin/env bash
# The learning rates of every kind, tuned alike on seed 1. 42 runs, about three hours on two
# cores.
#
# A kind has one rate, or two: that of the whole, and that of its table or its experts. Each sweep
# starts at 3e-3 for the whole, 4e-2 for a table and 3e-3 for experts. It tries half and twice the
# first, a quarter and four times the second, and goes on from the best until both neighbours are
# worse. The best of each kind is not here: it is seed 1 of baselines.sh, or of
# table_optimizer.sh (adamw-memory, adamw-ultramem).
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

run tune-dense-1.5e-3 --ffn dense --learning-rate 1.5e-3 --seed 1
run tune-dense-6e-3 --ffn dense --learning-rate 6e-3 --seed 1

run tune-dense2-1.5e-3 --ffn dense --n-embd 96 --learning-rate 1.5e-3 --seed 1
run tune-dense2-6e-3 --ffn dense --n-embd 96 --learning-rate 6e-3 --seed 1

run tune-dense4-7.5e-4 --ffn dense --n-embd 144 --learning-rate 7.5e-4 --seed 1
run tune-dense4-3e-3 --ffn dense --n-embd 144 --learning-rate 3e-3 --seed 1

run tune-moe-1.5e-3-3e-3 --ffn moe --learning-rate 1.5e-3 --expert-lr 3e-3 --seed 1
run tune-moe-6e-3-3e-3 --ffn moe --learning-rate 6e-3 --expert-lr 3e-3 --seed 1
run tune-moe-3e-3-7.5e-4 --ffn moe --learning-rate 3e-3 --expert-lr 7.5e-4 --seed 1
run tune-moe-3e-3-1.2e-2 --ffn moe --learning-rate 3e-3 --expert-lr 1.2e-2 --seed 1

run tune-hash-1.5e-3-4e-2 --ffn hash $adamw --learning-rate 1.5e-3 --value-lr 4e-2 --seed 1
run tune-hash-6e-3-4e-2 --ffn hash $adamw --learning-rate 6e-3 --value-lr 4e-2 --seed 1
run tune-hash-3e-3-1e-2 --ffn hash $adamw --learning-rate 3e-3 --value-lr 1e-2 --seed 1
run tune-hash-3e-3-1.6e-1 --ffn hash $adamw --learning-rate 3e-3 --value-lr 1.6e-1 --seed 1

run tune-peer-3e-3-4e-2 --ffn peer $adamw --learning-rate 3e-3 --value-lr 4e-2 --seed 1
run tune-peer-3e-3-1e-2 --ffn peer $adamw --learning-rate 3e-3 --value-lr 1e-2 --seed 1
run tune-peer-3e-3-3e-3 --ffn peer $adamw --learning-rate 3e-3 --value-lr 3e-3 --seed 1
run tune-peer-7.5e-4-1e-2 --ffn peer $adamw --learning-rate 7.5e-4 --value-lr 1e-2 --seed 1

run tune-adamw-ultramem-7.5e-4-1.6e-1 --ffn ultramem $adamw --learning-rate 7.5e-4 \
    --value-lr 1.6e-1 --seed 1
run tune-adamw-ultramem-1.5e-3-4e-2 --ffn ultramem $adamw --learning-rate 1.5e-3 \
    --value-lr 4e-2 --seed 1
run tune-adamw-ultramem-1.5e-3-6.4e-1 --ffn ultramem $adamw --learning-rate 1.5e-3 \
    --value-lr 6.4e-1 --seed 1
run tune-adamw-ultramem-3e-3-4e-2 --ffn ultramem $adamw --learning-rate 3e-3 \
    --value-lr 4e-2 --seed 1
run tune-adamw-ultramem-3e-3-1.6e-1 --ffn ultramem $adamw --learning-rate 3e-3 \
    --value-lr 1.6e-1 --seed 1
run tune-adamw-ultramem-3e-3-6.4e-1 --ffn ultramem $adamw --learning-rate 3e-3 \
    --value-lr 6.4e-1 --seed 1
run tune-adamw-ultramem-6e-3-4e-2 --ffn ultramem $adamw --learning-rate 6e-3 \
    --value-lr 4e-2 --seed 1

run tune-adamw-memory-1.5e-3-1.6e-1 $adamw --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1
run tune-adamw-memory-6e-3-1.6e-1 $adamw --learning-rate 6e-3 --value-lr 1.6e-1 --seed 1
run tune-adamw-memory-3e-3-1e-2 $adamw --learning-rate 3e-3 --value-lr 1e-2 --seed 1
run tune-adamw-memory-3e-3-4e-2 $adamw --learning-rate 3e-3 --value-lr 4e-2 --seed 1
run tune-adamw-memory-3e-3-8e-2 $adamw --learning-rate 3e-3 --value-lr 8e-2 --seed 1
run tune-adamw-memory-3e-3-6.4e-1 $adamw --learning-rate 3e-3 --value-lr 6.4e-1 --seed 1

run tune-plus-1.5e-3-1.6e-1 --mem-gate --qk-norm $adamw --learning-rate 1.5e-3 \
    --value-lr 1.6e-1 --seed 1
run tune-plus-6e-3-1.6e-1 --mem-gate --qk-norm $adamw --learning-rate 6e-3 \
    --value-lr 1.6e-1 --seed 1
run tune-plus-3e-3-4e-2 --mem-gate --qk-norm $adamw --learning-rate 3e-3 --value-lr 4e-2 --seed 1
run tune-plus-3e-3-1.6e-1 --mem-gate --qk-norm $adamw --learning-rate 3e-3 \
    --value-lr 1.6e-1 --seed 1
run tune-plus-3e-3-6.4e-1 --mem-gate --qk-norm $adamw --learning-rate 3e-3 \
    --value-lr 6.4e-1 --seed 1
run tune-plus-3e-3-2.56 --mem-gate --qk-norm $adamw --learning-rate 3e-3 --value-lr 2.56 --seed 1
run tune-plus-1.5e-3-6.4e-1 --mem-gate --qk-norm $adamw --learning-rate 1.5e-3 \
    --value-lr 6.4e-1 --seed 1
run tune-plus-7.5e-4-6.4e-1 --mem-gate --qk-norm $adamw --learning-rate 7.5e-4 \
    --value-lr 6.4e-1 --seed 1
run tune-plus-7.5e-4-2.56 --mem-gate --qk-norm $adamw --learning-rate 7.5e-4 \
    --value-lr 2.56 --seed 1
run tune-plus-1.5e-3-10.24 --mem-gate --qk-norm $adamw --learning-rate 1.5e-3 \
    --value-lr 10.24 --seed 1

# More experts, each of half the size.
run tune-experts-256 --ffn moe --moe-experts 256 --seed 1
finish
