#!/usr/bin/env bash
# Does it matter how the facts name their people? Dense, memory and hash, three seeds, on two more
# corpora: in one no three words in a row show both parts of a name, in the other a name is a single
# word. And Memory with AdamW. 24 runs, about 70 minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for names in apart single; do
    $python prepare_data.py --names $names --out data/facts-$names
    for seed in 1 2 3; do
        run $names-dense-$seed --ffn dense --data data/facts-$names --seed $seed
        run $names-memory-$seed --data data/facts-$names --seed $seed
        run $names-adamw-$seed $adamw --value-lr 1.6e-1 --data data/facts-$names --seed $seed
        run $names-hash-$seed --ffn hash $adamw --value-lr 4e-2 --data data/facts-$names \
            --seed $seed
    done
done
finish
