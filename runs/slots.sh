#!/usr/bin/env bash
# More slots: 1,024 to 262,144, dense models of two widths, and fewer reads. Three seeds each.
# 24 runs, of which facts.sh shares 6. About an hour and 40 minutes on two cores. Then compare them.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run facts-n32-$seed --mem-n-keys 32 --seed $seed
    run facts-n64-$seed --mem-n-keys 64 --seed $seed
    run facts-memory-$seed --seed $seed
    run facts-n256-$seed --mem-n-keys 256 --seed $seed
    run facts-n512-$seed --mem-n-keys 512 --seed $seed
    run facts-dense-$seed --ffn dense --seed $seed
    run facts-dense-128-$seed --ffn dense --n-embd 128 --learning-rate 1.5e-3 --seed $seed
    run facts-k8-$seed --mem-topk 8 --seed $seed
done
$python train.py --compare out/facts-dense-[123] out/facts-n32-[123] out/facts-n64-[123] \
    out/facts-memory-[123] out/facts-n256-[123] out/facts-n512-[123] out/facts-dense-128-[123]
