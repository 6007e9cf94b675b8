#!/usr/bin/env bash
# Facts of the real world, in two tables as prepare_data.py facts --from-file takes them:
#
#     bash runs/own_facts.sh FACTS.tsv PATTERNS.tsv
#
# Dense, memory, mixture of experts and hash on the same sentences, once with a token for each word
# and once with a token for each byte. 1,447 steps of 64 sentences read the 92,608 once. Three seeds
# at the best rates, and on seed 1 the rates that were tried beside them. 84 runs, of 3 to 5 minutes
# on one core. These numbers and rates suit about 5,000 facts; they were found with the tables that
# docs/results.md describes. For other tables, first move data/own-* and out/*own-* away.
if (($# != 2)); then
    echo "own_facts.sh: give two tables, FACTS.tsv and PATTERNS.tsv (README.md: Your own facts)" >&2
    exit 2
fi
here=$PWD  # the paths of the tables start here, and run.sh goes to another folder
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
facts=$(cd "$here" && realpath "$1")
patterns=$(cd "$here" && realpath "$2")

# With bytes, sentences of more than 48 are left out, and some facts with them: so its --zipf-shift
# differs. With both, the most frequent fact stands in the text about 200 times.
$python prepare_data.py facts --from-file "$facts" "$patterns" --documents 92608 \
    --zipf-shift 165 --tokenizer words --out data/own-words
$python prepare_data.py facts --from-file "$facts" "$patterns" --documents 92608 \
    --zipf-shift 156 --tokenizer bytes --longest 48 --out data/own-bytes

# train NAME SEED TOKENS KIND RATE [RATE OF THE TABLE OR OF THE EXPERTS]
train() {
    local name=$1 seed=$2 tokens=$3 kind=$4 rate=$5 second=${6:-}
    local flags=(--ffn "$kind" --learning-rate "$rate")
    if [[ $kind == moe ]]; then
        flags+=(--expert-lr "$second")
    elif [[ $second ]]; then
        flags+=($adamw --value-lr "$second")
    fi
    run "$name" "${flags[@]}" --data "data/own-$tokens" --batch-size 64 --max-steps 1447 \
        --seed "$seed"
}

# The best rates, which three seeds take: study TOKENS KIND RATE [OTHER RATE]
study() {
    for seed in 1 2 3; do
        train "own-$1-$2-$seed" $seed "$@"
    done
}

# Rates that were tried beside them, on seed 1: try TOKENS KIND RATE [OTHER RATE]
try() {
    train "tune-own-$1-$2-$3${4:+-$4}" 1 "$@"
}

study words dense 1.2e-2
study words memory 1.2e-2 4e-2
study words hash 1.2e-2 6.4e-1
study words moe 1.2e-2 3e-3
try words dense 3e-3
try words dense 6e-3
try words dense 2.4e-2
# At 1.2e-2 the seeds of dense differ widely, so half of that gets three seeds as well: the run
# above and these two.
for seed in 2 3; do
    train own-words-dense-6e-3-$seed $seed words dense 6e-3
done
# RowAdam, at the best rate of AdamW and at twice that.
for seed in 1 2 3; do
    run row-own-words-4e-2-$seed --learning-rate 1.2e-2 --value-lr 4e-2 --data data/own-words \
        --batch-size 64 --max-steps 1447 --seed $seed
done
run row-own-words-8e-2-1 --learning-rate 1.2e-2 --value-lr 8e-2 --data data/own-words \
    --batch-size 64 --max-steps 1447 --seed 1
try words memory 3e-3 1.6e-1
try words memory 6e-3 4e-2
try words memory 6e-3 1.6e-1
try words memory 6e-3 6.4e-1
try words memory 1.2e-2 1e-2
try words memory 1.2e-2 1.6e-1
try words memory 2.4e-2 4e-2
try words hash 3e-3 1.6e-1
try words hash 6e-3 4e-2
try words hash 6e-3 1.6e-1
try words hash 6e-3 6.4e-1
try words hash 1.2e-2 4e-2
try words hash 1.2e-2 1.6e-1
try words hash 1.2e-2 2.56
try words hash 2.4e-2 1.6e-1
try words hash 2.4e-2 6.4e-1
try words moe 3e-3 3e-3
try words moe 6e-3 3e-3
try words moe 1.2e-2 7.5e-4
try words moe 1.2e-2 1.2e-2
try words moe 2.4e-2 3e-3

for rate in 1.6e-1 6.4e-1 1.28; do
    run row-own-bytes-$rate-1 --learning-rate 6e-3 --value-lr $rate --data data/own-bytes \
        --batch-size 64 --max-steps 1447 --seed 1
done
study bytes dense 6e-3
study bytes memory 6e-3 6.4e-1
study bytes hash 3e-3 6.4e-1
study bytes moe 1.5e-3 4.8e-2
try bytes dense 1.5e-3
try bytes dense 3e-3
try bytes dense 1.2e-2
try bytes memory 3e-3 4e-2
try bytes memory 3e-3 1.6e-1
try bytes memory 3e-3 6.4e-1
try bytes memory 6e-3 1.6e-1
try bytes memory 6e-3 2.56
try bytes memory 1.2e-2 6.4e-1
try bytes hash 1.5e-3 6.4e-1
try bytes hash 3e-3 1e-2
try bytes hash 3e-3 4e-2
try bytes hash 3e-3 1.6e-1
try bytes hash 3e-3 2.56
try bytes hash 6e-3 1.6e-1
try bytes hash 6e-3 6.4e-1
try bytes moe 7.5e-4 4.8e-2
try bytes moe 1.5e-3 1.2e-2
try bytes moe 1.5e-3 1.92e-1
try bytes moe 3e-3 7.5e-4
try bytes moe 3e-3 3e-3
try bytes moe 3e-3 1.2e-2
try bytes moe 3e-3 4.8e-2
try bytes moe 3e-3 1.92e-1
try bytes moe 6e-3 3e-3
try bytes moe 6e-3 1.2e-2
try bytes moe 6e-3 4.8e-2
finish
