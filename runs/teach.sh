#!/usr/bin/env bash
# What is lost when 100 new facts are taught, until 95 of them are known: to the values of some
# slots, to all values, to the whole model? Three seeds. 3 runs, which baselines.sh shares, and 30
# times a few seconds of teaching. 15 minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# teach SEED NAME FLAGS...
teach() {
    local seed=$1 out=out/teach-$2-$1
    shift 2
    if [[ ! -e $out/edit.json ]]; then
        $python sample.py out/facts-memory-$seed --teach runs/new_facts.tsv \
            --patterns runs/new_patterns.tsv --out $out "$@"
    fi
}

for seed in 1 2 3; do
    run facts-memory-$seed --seed $seed
done
finish
for seed in 1 2 3; do
    for slots in 512 1024 2048 4096 8192; do
        teach $seed slots-$slots --slots $slots
    done
    teach $seed all-values-3 --teach-with all-values --teach-rate 3
    teach $seed all-values-10 --teach-with all-values --teach-rate 10
    for rate in 3e-5 1e-4 3e-4; do
        teach $seed full-$rate --teach-with full --teach-rate $rate
    done
done
