#!/usr/bin/env bash
# Requests a second, latency and processor time a request of `temper serve` and
# of onnxruntime behind Node, in turn on the same machine, and then of temper
# while its channel goes to another model and back again and again. It fails
# where an answer is not 200 or a request fails.
#
#   run.sh [SECONDS [CONNECTIONS...]]    (5 s; 8 and 32 connections)
#
# $TEMPER is the program (temper), $ONNXRUNTIME the folder whose node_modules
# has onnxruntime-node (.task/onnxruntime, by `go tool task onnxruntime`);
# without it there is no peer. Needs wrk.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../../../.." && pwd)
export IMAGES=$root/models/dataset/mnist/t10k-images-idx3-ubyte.gz COSIGN_PASSWORD=
temper=${TEMPER:-temper}
runtime=${ONNXRUNTIME:-$root/.task/onnxruntime}
seconds=${1:-5}
connections=("${@:2}")
[ ${#connections[@]} -gt 0 ] || connections=(8 32)

work=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
cd "$work"

# Two networks, hardly trained, that a policy without demands lets through.
cat >policy.yaml <<'POLICY'
name: mnist
network: wong
dataset: mnist
recipe: {train: standard, retrain: fast}
threat: {norm: linf, epsilon: 0.3}
policy: {attacks: [fgsm], min_clean_accuracy: 0.5, min_robust_accuracy: 0, max_clean_regression: 1, max_robust_regression: 1, min_samples: 1000, confidence: 0.95}
POLICY
"$temper" keygen -q --dir keys >/dev/null
for version in 1 2; do
  network=$("$temper" train wong -q --epochs 0.5 --seed $version --output oci:mnist:network-$version)
  [ $version = 2 ] || cp "mnist/blobs/sha256/$(ls -S mnist/blobs/sha256 | head -n 1)" wong.onnx # the largest file of its artifact
  report=$("$temper" evaluate -q --model "$network" --policy policy.yaml --output oci:mnist:report-$version)
  "$temper" pack -q --model "$network" --report "$report" --output oci:mnist:$version
  "$temper" sign -q --key keys/cosign.key --policy policy.yaml oci:mnist:$version
done >/dev/null
promote() {
  "$temper" promote -q --channel oci:mnist:production --model oci:mnist:"$1" --key keys/cosign.key --policy policy.yaml "${@:2}" >/dev/null
}
promote 1
promote 2

"$temper" serve -q --channel oci:mnist:production --key keys/cosign.pub --name mnist --poll 200ms \
  --listen 127.0.0.1:18080 --admin-listen 127.0.0.1:18081 --grpc-listen "" &
server=$!
pids+=($server)
peer=
if [ -d "$runtime/node_modules/onnxruntime-node" ] && command -v node >/dev/null; then
  NODE_PATH=$runtime/node_modules node "$here/node.js" wong.onnx 18090 &
  peer=$!
  pids+=($peer)
  sleep 2
fi
until curl -fs 127.0.0.1:18081/v2/health/ready >/dev/null; do sleep 0.1; done

# ticks is the processor time of a process and its children, in 1/100 s.
ticks() { cat "/proc/$1/stat" $(for child in $(pgrep -P "$1"); do echo "/proc/$child/stat"; done) | awk '{ sub(/^.*\) /, ""); t += $12 + $13 } END { print t }'; }
load() { # NAME PROCESS PORT KIND CONNECTIONS
  local before after line
  before=$(ticks "$2")
  line=$(KIND=$4 wrk -t1 -c"$5" -d"${seconds}s" -s "$here/request.lua" "http://127.0.0.1:$3/v2/models/mnist/infer" | grep RESULT)
  after=$(ticks "$2")
  read -r _ n rate p50 p99 status failed <<<"$line"
  printf '%-24s %-7s %4d %9d /s  p50 %6.2f ms  p99 %6.2f ms  %4d us  %d not 200, %d failed\n' \
    "$1" "$4" "$5" "$rate" "$p50" "$p99" $(((after - before) * 10000 / n)) "$status" "$failed"
  [ "$status" = 0 ] && [ "$failed" = 0 ]
}
for c in "${connections[@]}"; do
  for kind in json bytes binary; do
    load "temper serve" $server 18080 $kind "$c"
    [ -z "$peer" ] || [ $kind = bytes ] || load "onnxruntime + Node" $peer 18090 $kind "$c"
  done
done

[ -z "$peer" ] || kill $peer
loads() { curl -fs 127.0.0.1:18081/metrics | awk '/^temper_model_loads_total/ { print $2 }'; }
before=$(loads)
load "while models change" $server 18080 json "${connections[-1]}" &
traffic=$!
promotions=0
while kill -0 $traffic 2>/dev/null; do
  promote $((promotions % 2 + 1)) --rollback --reason "the other one again"
  promotions=$((promotions + 1))
done
wait $traffic
reloads=$(($(loads) - before))
echo "$promotions promotions, $reloads reloads"
[ "$reloads" -ge 2 ] # there and back: otherwise it shows nothing
