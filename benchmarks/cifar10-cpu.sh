#!/usr/bin/env bash
# ZO-AE-DS on CIFAR-10 against a hidden ResNet-20 at the scale of two cores: docs/results/cifar10-cpu.md.
#
#   benchmarks/cifar10-cpu.sh DATA OUT
#
# DATA holds CIFAR-10 (npz files or torchvision's) and resnet20.safetensors. Run it again to resume.
set -euo pipefail
data=$(realpath "$1") out=$2
here=$(cd "$(dirname "$0")" && pwd)
bin=${BIN:-$here/../.venv/bin}
mkdir -p "$out"
ledger=sqlite:///$(realpath "$out")/ledger.db
log=$out/oracle.log

"$bin/oracle-server" clients add cifar10-cpu --budget 6000000 --ledger "$ledger" --key-file "$out/key" --exist-ok
"$bin/oracle-server" serve --model cifar-resnet20 --weights "$data/resnet20.safetensors" \
  --port 0 --ledger "$ledger" >"$log" 2>&1 &
server=$!
trap 'kill $server; wait $server' EXIT
until grep -q "listening on" "$log"; do kill -0 $server; sleep 0.5; done
ORACLE_URL=$(sed -n 's/^listening on //p' "$log")
ORACLE_API_KEY=$(cat "$out/key")
export ORACLE_URL ORACLE_API_KEY

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
