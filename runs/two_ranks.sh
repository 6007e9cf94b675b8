#!/usr/bin/env bash
# The default run in two processes that share the table. Three seeds, about 15 minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run_by_two facts-2ranks-$seed --seed $seed
done
