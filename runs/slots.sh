#!/usr/bin/env bash
# More slots: 1,024 to 1,048,576, beside dense models of three widths. And fewer reads. Three seeds.
# 30 runs, of which baselines.sh shares 15. About two hours on two cores. Then compare them.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

for seed in 1 2 3; do
    run facts-n32-$seed --mem-n-keys 32 --seed $seed
    run facts-n64-$seed --mem-n-keys 64 --seed $seed
    run facts-memory-$seed --seed $seed
    run facts-n256-$seed --mem-n-keys 256 --seed $seed
    run facts-n512-$seed --mem-n-keys 512 --seed $seed
    run facts-n1024-$seed --mem-n-keys 1024 --seed $seed
    run facts-dense-$seed --ffn dense --seed $seed
    run facts-dense2-$seed --ffn dense --n-embd 96 --seed $seed
    run facts-dense4-$seed --ffn dense --n-embd 144 --learning-rate 1.5e-3 --seed $seed
    run adamw-k8-$seed $adamw --value-lr 1.6e-1 --mem-topk 8 --seed $seed
done
finish
$python train.py --compare out/facts-dense-[123] out/facts-n32-[123] out/facts-n64-[123] \
    out/facts-memory-[123] out/facts-n256-[123] out/facts-n512-[123] out/facts-n1024-[123] \
    out/facts-dense4-[123]
