#!/bin/sh
# Generate agent/rpc from proto/. With --check: fail if what is committed differs.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=.
[ "${1:-}" = --check ] && out=$(mktemp -d)
"$python" -m grpc_tools.protoc -Iagent/rpc=proto --python_out="$out" --pyi_out="$out" \
  --grpc_python_out="$out" agent/rpc/types.proto agent/rpc/control.proto agent/rpc/peer.proto
if [ "$out" != . ]; then
  for f in "$out"/agent/rpc/*; do
    diff -u "agent/rpc/${f##*/}" "$f" || { echo "agent/rpc is not what proto/ says: run scripts/generate.sh" >&2; exit 1; }
  done
  rm -rf "$out"
fi
