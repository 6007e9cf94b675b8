#!/usr/bin/env bash
# Memory+ where it has room: 8 blocks, of which three have memory layers that share one table, as
# the paper has it. Beside it dense, Memory with one such layer and with three. Three seeds, and on
# seed 1 the rates that were tried. Also on seed 1: Memory+ with a gate that starts open, without
# the gate, and without the norm. 25 runs, about two hours on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

dense=(--n-layer 8 --ffn dense)
memory=(--n-layer 8 --mem-layers 4)
three=(--n-layer 8 --mem-layers 1,4,6)
plus=("${three[@]}" --mem-gate --qk-norm)
open=("${plus[@]}" --mem-gate-open)
norm=("${three[@]}" --qk-norm)
gate=("${three[@]}" --mem-gate)

for seed in 1 2 3; do
    run deep-dense-$seed "${dense[@]}" --learning-rate 3e-3 --seed $seed
    run deep-memory-$seed "${memory[@]}" --learning-rate 3e-3 --value-lr 1.6e-1 --seed $seed
    run deep-three-$seed "${three[@]}" --learning-rate 3e-3 --value-lr 4e-2 --seed $seed
    run deep-plus-$seed "${plus[@]}" --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed $seed
done
run deep-open-1 "${open[@]}" --learning-rate 3e-3 --value-lr 1.6e-1 --seed 1
run deep-norm-1 "${norm[@]}" --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1
run deep-gate-1 "${gate[@]}" --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1

run tune-deep-dense-1.5e-3 "${dense[@]}" --learning-rate 1.5e-3 --seed 1
run tune-deep-memory-1.5e-3-1.6e-1 "${memory[@]}" --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1
run tune-deep-three-3e-3-1.6e-1 "${three[@]}" --learning-rate 3e-3 --value-lr 1.6e-1 --seed 1
run tune-deep-three-1.5e-3-1.6e-1 "${three[@]}" --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1
run tune-deep-plus-1.5e-3-4e-2 "${plus[@]}" --learning-rate 1.5e-3 --value-lr 4e-2 --seed 1
run tune-deep-plus-1.5e-3-6.4e-1 "${plus[@]}" --learning-rate 1.5e-3 --value-lr 6.4e-1 --seed 1
run tune-deep-plus-1.5e-3-2.56 "${plus[@]}" --learning-rate 1.5e-3 --value-lr 2.56 --seed 1
run tune-deep-plus-3e-3-4e-2 "${plus[@]}" --learning-rate 3e-3 --value-lr 4e-2 --seed 1
run tune-deep-plus-3e-3-1.6e-1 "${plus[@]}" --learning-rate 3e-3 --value-lr 1.6e-1 --seed 1
run tune-deep-open-1.5e-3-1.6e-1 "${open[@]}" --learning-rate 1.5e-3 --value-lr 1.6e-1 --seed 1
finish
