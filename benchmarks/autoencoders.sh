#!/usr/bin/env bash
# What an autoencoder leaves of the classifier, on CIFAR-10: docs/results/query-efficiency.md.
#
#   benchmarks/autoencoders.sh DATA OUT
#
# The same MSE-trained denoiser in front of each autoencoder; then 375 white-box steps of 32 images, the most that estimates
# of the gradient could teach. Prints the validation (1,000 noisy images, agreement with the oracle) at the start, which is
# one step at a rate of nothing, and at the end. DATA holds CIFAR-10 and resnet20.safetensors. Run it again to resume.
set -euo pipefail
data=$(realpath "$1") out=$2
. "$(dirname "$0")/serving.sh"
serve autoencoders 1000000 "$data" "$out" --allow-decoders

train() { # DIRECTORY PRESET SETTING...
  "$bin/defender-client" train "$2" --scale cpu --dataset cifar10 --data "$data" --out "$out/$1" \
    --whitebox "$data/resnet20.safetensors" --whitebox-model cifar-resnet20 \
    --set pretrain.denoiser_epochs=8 --set pretrain.batch=128 --set pretrain.lr=0.002 --set train.batch=32 "${@:3}"
}
compare() { # NAME PRESET SETTING...
  local run=$out/$1
  train "$1/start" "${@:2}" --set train.steps=1 --set train.lr=1e-12
  mkdir -p "$run/end"
  cp -n "$run/start/pretrained.safetensors" "$run/end/"
  train "$1/end" "${@:2}" --set train.steps=375 --set train.lr=1e-4
  echo "$1: $(tail -qn 1 "$run/start/training.jsonl" "$run/end/training.jsonl" | tr '\n' ' ')"
}
compare pixels fo-ds
compare paper-192 fo-ae-ds
compare pca-192 fo-ae-ds --set autoencoder.architecture=pca
compare pca-576 fo-ae-ds --set autoencoder.architecture=pca --set autoencoder.latent=576
