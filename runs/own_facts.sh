#!/usr/bin/env bash
# Facts of the real world, in two tables as prepare_data.py facts --from-file takes them:
#
#     bash runs/own_facts.sh FACTS.tsv PATTERNS.tsv
#
# Dense, memory, mixture of experts and hash on the same sentences, once with a token for each word
# and once with a token for each byte. First, on seed 1, a quarter and four times the rate that suits
# the invented facts (dense: half and twice). Then three seeds at the best. 40 runs; with 11,600
# facts about two hours on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
if (($# != 2)); then
    echo "own_facts.sh: give two tables, FACTS.tsv and PATTERNS.tsv (README.md: Your own facts)" >&2
    exit 2
fi

for tokens in words bytes; do
    data=data/own-$tokens
    $python prepare_data.py facts --from-file "$1" "$2" --tokenizer $tokens --out $data
    own=own-$tokens
    for seed in 1 2 3; do
        run $own-dense-$seed --ffn dense --data $data --seed $seed
        run $own-memory-$seed --data $data --seed $seed
        run $own-moe-$seed --ffn moe --data $data --seed $seed
        run $own-hash-$seed --ffn hash --value-lr 4e-2 --data $data --seed $seed
    done
    run tune-$own-dense-1.5e-3 --ffn dense --learning-rate 1.5e-3 --data $data --seed 1
    run tune-$own-dense-6e-3 --ffn dense --learning-rate 6e-3 --data $data --seed 1
    run tune-$own-memory-4e-2 --value-lr 4e-2 --data $data --seed 1
    run tune-$own-memory-6.4e-1 --value-lr 6.4e-1 --data $data --seed 1
    run tune-$own-moe-7.5e-4 --ffn moe --expert-lr 7.5e-4 --data $data --seed 1
    run tune-$own-moe-1.2e-2 --ffn moe --expert-lr 1.2e-2 --data $data --seed 1
    run tune-$own-hash-1e-2 --ffn hash --value-lr 1e-2 --data $data --seed 1
    run tune-$own-hash-1.6e-1 --ffn hash --value-lr 1.6e-1 --data $data --seed 1
done
finish
