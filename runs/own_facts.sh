#!/usr/bin/env bash
# Facts of the real world, in two tables as prepare_data.py facts --from-file takes them:
#
#     bash runs/own_facts.sh FACTS.tsv PATTERNS.tsv
#
# Dense, memory, mixture of experts and hash on the same sentences, once with a token for each word
# and once with a token for each byte. 1,447 steps of 64 sentences read the 92,608 once. Three seeds
# at the best rates, and on seed 1 the rates that were tried beside them. 61 runs, of 3 to 5 minutes
# on one core.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
if (($# != 2)); then
    echo "own_facts.sh: give two tables, FACTS.tsv and PATTERNS.tsv (README.md: Your own facts)" >&2
    exit 2
fi

$python prepare_data.py facts --from-file "$1" "$2" --documents 92608 --tokenizer words \
    --out data/own-words
$python prepare_data.py facts --from-file "$1" "$2" --documents 92608 --tokenizer bytes \
    --longest 48 --out data/own-bytes

for seed in 1 2 3; do
    run own-words-dense-$seed --ffn dense --learning-rate 6e-3 \
        --data data/own-words --batch-size 64 --max-steps 1447 --seed $seed
    run own-words-memory-$seed --learning-rate 6e-3 --value-lr 1.6e-1 \
        --data data/own-words --batch-size 64 --max-steps 1447 --seed $seed
    run own-words-hash-$seed --ffn hash --learning-rate 6e-3 --value-lr 1.6e-1 \
        --data data/own-words --batch-size 64 --max-steps 1447 --seed $seed
    run own-words-moe-$seed --ffn moe --learning-rate 6e-3 --expert-lr 3e-3 \
        --data data/own-words --batch-size 64 --max-steps 1447 --seed $seed
done
run tune-own-words-dense-3e-3 --ffn dense --learning-rate 3e-3 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-dense-1.2e-2 --ffn dense --learning-rate 1.2e-2 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-memory-3e-3-1.6e-1 --learning-rate 3e-3 --value-lr 1.6e-1 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-memory-1.2e-2-1.6e-1 --learning-rate 1.2e-2 --value-lr 1.6e-1 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-memory-6e-3-4e-2 --learning-rate 6e-3 --value-lr 4e-2 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-memory-6e-3-6.4e-1 --learning-rate 6e-3 --value-lr 6.4e-1 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-hash-3e-3-1.6e-1 --ffn hash --learning-rate 3e-3 --value-lr 1.6e-1 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-hash-1.2e-2-1.6e-1 --ffn hash --learning-rate 1.2e-2 --value-lr 1.6e-1 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-hash-6e-3-4e-2 --ffn hash --learning-rate 6e-3 --value-lr 4e-2 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-hash-6e-3-6.4e-1 --ffn hash --learning-rate 6e-3 --value-lr 6.4e-1 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-moe-3e-3-3e-3 --ffn moe --learning-rate 3e-3 --expert-lr 3e-3 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-moe-1.2e-2-3e-3 --ffn moe --learning-rate 1.2e-2 --expert-lr 3e-3 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-moe-6e-3-7.5e-4 --ffn moe --learning-rate 6e-3 --expert-lr 7.5e-4 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1
run tune-own-words-moe-6e-3-1.2e-2 --ffn moe --learning-rate 6e-3 --expert-lr 1.2e-2 \
    --data data/own-words --batch-size 64 --max-steps 1447 --seed 1

for seed in 1 2 3; do
    run own-bytes-dense-$seed --ffn dense --learning-rate 6e-3 \
        --data data/own-bytes --batch-size 64 --max-steps 1447 --seed $seed
    run own-bytes-memory-$seed --learning-rate 6e-3 --value-lr 6.4e-1 \
        --data data/own-bytes --batch-size 64 --max-steps 1447 --seed $seed
    run own-bytes-hash-$seed --ffn hash --learning-rate 3e-3 --value-lr 6.4e-1 \
        --data data/own-bytes --batch-size 64 --max-steps 1447 --seed $seed
    run own-bytes-moe-$seed --ffn moe --learning-rate 3e-3 --expert-lr 4.8e-2 \
        --data data/own-bytes --batch-size 64 --max-steps 1447 --seed $seed
done
run tune-own-bytes-dense-1.5e-3 --ffn dense --learning-rate 1.5e-3 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-dense-3e-3 --ffn dense --learning-rate 3e-3 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-dense-1.2e-2 --ffn dense --learning-rate 1.2e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-memory-3e-3-4e-2 --learning-rate 3e-3 --value-lr 4e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-memory-3e-3-1.6e-1 --learning-rate 3e-3 --value-lr 1.6e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-memory-3e-3-6.4e-1 --learning-rate 3e-3 --value-lr 6.4e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-memory-6e-3-1.6e-1 --learning-rate 6e-3 --value-lr 1.6e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-memory-6e-3-2.56 --learning-rate 6e-3 --value-lr 2.56 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-memory-1.2e-2-6.4e-1 --learning-rate 1.2e-2 --value-lr 6.4e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-3e-3-1e-2 --ffn hash --learning-rate 3e-3 --value-lr 1e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-3e-3-4e-2 --ffn hash --learning-rate 3e-3 --value-lr 4e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-3e-3-1.6e-1 --ffn hash --learning-rate 3e-3 --value-lr 1.6e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-3e-3-2.56 --ffn hash --learning-rate 3e-3 --value-lr 2.56 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-6e-3-1.6e-1 --ffn hash --learning-rate 6e-3 --value-lr 1.6e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-6e-3-6.4e-1 --ffn hash --learning-rate 6e-3 --value-lr 6.4e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-hash-1.5e-3-6.4e-1 --ffn hash --learning-rate 1.5e-3 --value-lr 6.4e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-3e-3-7.5e-4 --ffn moe --learning-rate 3e-3 --expert-lr 7.5e-4 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-3e-3-3e-3 --ffn moe --learning-rate 3e-3 --expert-lr 3e-3 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-3e-3-1.2e-2 --ffn moe --learning-rate 3e-3 --expert-lr 1.2e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-6e-3-3e-3 --ffn moe --learning-rate 6e-3 --expert-lr 3e-3 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-6e-3-1.2e-2 --ffn moe --learning-rate 6e-3 --expert-lr 1.2e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-3e-3-1.92e-1 --ffn moe --learning-rate 3e-3 --expert-lr 1.92e-1 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
run tune-own-bytes-moe-1.5e-3-4.8e-2 --ffn moe --learning-rate 1.5e-3 --expert-lr 4.8e-2 \
    --data data/own-bytes --batch-size 64 --max-steps 1447 --seed 1
finish
