# Sourced by the scripts that need a ResNet-20 oracle: serve CLIENT BUDGET DATA OUT [OPTION...] starts one on a free port, adds
# the client, and exports ORACLE_URL and ORACLE_API_KEY; it ends with the script. `bin` is where the programs are.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${BIN:-$here/../.venv/bin}

serve() {
  local client=$1 budget=$2 data=$3 out=$4
  mkdir -p "$out"
  local ledger log=$out/oracle.log
  ledger=sqlite:///$(realpath "$out")/ledger.db
  "$bin/oracle-server" clients add "$client" --budget "$budget" --ledger "$ledger" --key-file "$out/key" --exist-ok
  "$bin/oracle-server" serve --model cifar-resnet20 --weights "$data/resnet20.safetensors" \
    --port 0 --ledger "$ledger" "${@:5}" >"$log" 2>&1 &
  server=$!
  trap 'kill $server; wait $server' EXIT
  until grep -q "listening on" "$log"; do kill -0 $server; sleep 0.5; done
  ORACLE_URL=$(sed -n 's/^listening on //p' "$log")
  ORACLE_API_KEY=$(cat "$out/key")
  export ORACLE_URL ORACLE_API_KEY
}
