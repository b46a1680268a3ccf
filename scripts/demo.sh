#!/bin/bash
# The main job, on this machine: three hosts, one network, workloads that reach each other by name.
set -euo pipefail
cd "$(dirname "$0")/.."
vx=.venv/bin/vxmesh
[ "$(id -u)" = 0 ] || { echo "make up: needs root, for network namespaces. Run it as root" >&2; exit 1; }

$vx testbed up
on() { local host=$1; shift; $vx testbed exec "$host" -- vxmesh "$@"; }

if ! on h1 network inspect demo >/dev/null 2>&1; then
  on h1 network create demo --wait=10 >/dev/null
fi
for i in 1 2 3; do
  if ! on "h$i" exec "w$i" -- true >/dev/null 2>&1; then
    on "h$i" run --network demo --name "w$i" -d --wait=10 -- sleep infinity >/dev/null
  fi
done

echo
on h1 node ls
echo
on h1 endpoint ls --network demo
echo
for from in 1 2 3; do
  for to in 1 2 3; do
    [ "$from" = "$to" ] && continue
    if out=$(on "h$from" exec "w$from" -- ping -c1 -W2 "w$to"); then
      echo "w$from on h$from reaches w$to on h$to: $(grep -o '([0-9.]*)' <<<"$out" | head -1) $(grep -o 'time=.*' <<<"$out")"
    else
      echo "w$from on h$from does not reach w$to on h$to:" >&2
      echo "$out" >&2
      exit 1
    fi
  done
done

cat <<'TXT'

The network 'demo' joins three hosts. Try:

  export PATH=$PWD/.venv/bin:$PATH
  vxmesh testbed exec h1 -- vxmesh run --network demo --name one -d -- sleep 600
  vxmesh testbed exec h3 -- vxmesh run --network demo --name two -d -- sleep 600
  vxmesh testbed exec h1 -- vxmesh exec one -- ping -c1 two
  vxmesh testbed cut h3          # and 'heal h3'; 'kill h2' and 'start h2' for its agent

'make down' takes everything away again.
TXT
