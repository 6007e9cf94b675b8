#!/usr/bin/env bash
# Ordinary text: short stories and web pages, each a file of plain text with <|endoftext|> between
# two documents.
#
#     bash runs/text.sh STORIES.txt WEB.txt
#
# Dense, memory, Memory+, hash and mixture of experts, in 4 blocks of width 128. Three seeds at the
# best rates, dense and Memory+ also for twice the steps, and on seed 1 the rates that were tried
# beside them. 79 runs, of one to eight minutes on one core. The steps and rates suit 0.34 million
# tokens of stories, which are read once, and 2 million of web pages, of which half is read;
# docs/results.md describes them. For other files, first move data/text-* and out/*text-* away.
if (($# != 2)); then
    echo "text.sh: give two files of text, STORIES.txt and WEB.txt" >&2
    exit 2
fi
here=$PWD  # the paths of the files start here, and run.sh goes to another folder
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
stories=$(cd "$here" && realpath "$1")
web=$(cd "$here" && realpath "$2")
declare -A files=([stories]=$stories [web]=$web)
declare -A steps=([stories]=327 [web]=968)
declare -A layers=(
    [dense]="--ffn dense"
    [memory]="--ffn memory --no-mem-gate --no-qk-norm"
    [plus]="--ffn memory --mem-gate --qk-norm $adamw"
    [hash]="--ffn hash $adamw"
    [moe]="--ffn moe"
)

# Rarer words are spelled in bytes.
for text in stories web; do
    $python prepare_data.py "${files[$text]}" --tokenizer words --vocab-size 4096 \
        --val-fraction 0.05 --out "data/text-$text"
done

# train NAME SEED STEPS TEXT KIND RATE [RATE OF THE TABLE OR OF THE EXPERTS]
train() {
    local name=$1 seed=$2 max_steps=$3 text=$4 kind=$5 rate=$6 second=${7:-}
    local flags=(${layers[$kind]} --learning-rate "$rate")
    if [[ $kind == moe ]]; then
        flags+=(--expert-lr "$second")
    elif [[ $second ]]; then
        flags+=(--value-lr "$second")
    fi
    run "$name" tinystories "${flags[@]}" --data "data/text-$text" --max-steps "$max_steps" \
        --n-layer 4 --n-head 4 --n-embd 128 --block-size 128 --batch-size 8 \
        --mem-layers 2 --mem-n-keys 128 --eval-windows 2048 --seed "$seed"
}

# The best rates, which three seeds take: study TEXT KIND RATE [OTHER RATE]
study() {
    for seed in 1 2 3; do
        train "text-$1-$2-$seed" $seed "${steps[$1]}" "$@"
    done
}

# The same for twice as many steps.
study_longer() {
    for seed in 1 2 3; do
        train "text-$1-$2-long-$seed" $seed $((2 * steps[$1])) "$@"
    done
}

# Rates that were tried beside them, on seed 1: try TEXT KIND RATE [OTHER RATE]
try() {
    train "tune-text-$1-$2-$3${4:+-$4}" 1 "${steps[$1]}" "$@"
}

study stories dense 4e-3
study stories memory 4e-3 1.6e-1
study stories plus 4e-3 1.6e-1
study stories hash 8e-3 2.56
study stories moe 4e-3 4e-3
study_longer stories dense 4e-3
study_longer stories plus 4e-3 1.6e-1
try stories dense 2e-3
try stories dense 8e-3
try stories dense 1.6e-2
try stories memory 4e-3 1e-2
try stories memory 4e-3 4e-2
try stories memory 4e-3 6.4e-1
try stories plus 2e-3 1.6e-1
try stories plus 4e-3 4e-2
try stories plus 4e-3 6.4e-1
try stories plus 8e-3 1.6e-1
try stories hash 4e-3 2.56
try stories hash 8e-3 6.4e-1
try stories hash 8e-3 10.24
try stories hash 1.6e-2 2.56
try stories moe 2e-3 4e-3
try stories moe 4e-3 1e-3
try stories moe 4e-3 1.6e-2
try stories moe 8e-3 4e-3
try stories moe 8e-3 1.6e-2

study web dense 2e-3
study web memory 2e-3 4e-2
study web plus 2e-3 1.6e-1
study web hash 2e-3 6.4e-1
study web moe 2e-3 4e-3
study_longer web dense 2e-3
study_longer web plus 2e-3 1.6e-1
try web dense 1e-3
try web dense 4e-3
try web dense 8e-3
try web memory 2e-3 1e-2
try web memory 2e-3 8e-2
try web plus 1e-3 1.6e-1
try web plus 2e-3 4e-2
try web plus 2e-3 6.4e-1
try web plus 4e-3 1.6e-1
try web hash 1e-3 6.4e-1
try web hash 2e-3 1.6e-1
try web hash 2e-3 2.56
try web hash 4e-3 6.4e-1
try web hash 4e-3 2.56
try web moe 1e-3 4e-3
try web moe 2e-3 1e-3
try web moe 2e-3 1.6e-2
try web moe 4e-3 4e-3
finish
