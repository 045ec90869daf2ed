#!/usr/bin/env bash
# ZO-AE-DS on CIFAR-10 against a hidden ResNet-20 at the scale of two cores: docs/results/cifar10-cpu.md.
#
#   benchmarks/cifar10-cpu.sh DATA OUT
#
# DATA holds CIFAR-10 (npz files or torchvision's) and resnet20.safetensors. Run it again to resume.
set -euo pipefail
data=$(realpath "$1") out=$2
. "$(dirname "$0")/serving.sh"
serve cifar10-cpu 6000000 "$data" "$out"

client() { echo "\$ defender-client $*"; "$bin/defender-client" "$@"; }
preset=$here/cifar10-cpu.toml
client pretrain "$preset" --data "$data" --out "$out/defended"
client plan "$preset" --data "$data" --out "$out/defended"
client train "$preset" --data "$data" --out "$out/defended"
client train standard --dataset cifar10 --set data.validation_images=1000 --data "$data" --out "$out/undefended"
# What the queries bought: the same stack as it was before the first of them.
mkdir -p "$out/zero-query"
cp -n "$out/defended/pretrained.safetensors" "$out/zero-query/"
client train "$preset" --set estimator.name=none --data "$data" --out "$out/zero-query"
for run in defended undefended zero-query; do
  client certify --run "$out/$run" --data "$data" --n 1000 --images 500
done
client audit "$out/defended" "$out/undefended" "$out/zero-query"
client report "$out/undefended" "$out/zero-query" "$out/defended" --data "$data" --out "$out/report.html"
