#!/bin/bash
# Install what this machine lacks: setup.sh [dev|bench|fuzz]. Twice is no error, and quick.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-run}

need() { # need COMMAND PACKAGE …: the packages whose command is missing
  local missing=() command package
  while [ $# -gt 0 ]; do
    command=$1 package=$2
    shift 2
    PATH=$PATH:/usr/sbin:/sbin:/usr/lib/frr command -v "$command" >/dev/null || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup: these packages are missing: ${missing[*]}. Install them (as root on Debian or Ubuntu this is done for you)" >&2
    exit 1
  fi
  echo "setup: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  local log
  log=$(mktemp)
  { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 || {
    cat "$log" >&2
    rm -f "$log"
    exit 1
  }
  rm -f "$log"
}

without_services() { # without_services COMMAND…: what it installs is not started; call it in ( )
  local policy=/usr/sbin/policy-rc.d # Debian policy, 9.3.3.1
  if [ ! -e "$policy" ] && [ -w "${policy%/*}" ]; then
    # shellcheck disable=SC2064
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  "$@"
}

if [ "$what" = bench ]; then
  # What cannot be had is said by the benchmark itself, which then runs without it.
  (need bgpd frr) || true
  (need iperf3 iperf3) || true
  (without_services need dnsmasq dnsmasq-base dnsperf dnsperf) || true
  (without_services need haproxy haproxy nginx nginx-light wrk wrk) || true
  (without_services need dockerd docker.io busybox busybox-static) || true
  exit 0
fi

if [ "$what" = fuzz ]; then
  # Has wheels for few machines; without it nothing is guided by coverage, which is said.
  .venv/bin/python -c 'import atheris' 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris ||
    echo "setup: atheris cannot be installed here" >&2
  exit 0
fi

wireguard() { # what encrypted networks need: the kernel's, or else a process in its place
  if ip link add vxwsetup type wireguard 2>/dev/null; then
    ip link del vxwsetup
    return 0
  fi
  need wireguard-go wireguard-go
}

need nft nftables ip iproute2 tcpdump tcpdump ping iputils-ping
if [ "$what" = dev ]; then
  need iperf3 iperf3 wrk wrk wireguard-go wireguard-go # tests kill the process, whatever the kernel has
  # Engines are started by the tests. Where they cannot be had, those tests say so.
  (without_services need dockerd docker.io busybox busybox-static) ||
    echo "setup: going on without docker.io and busybox-static: tests/docker is skipped" >&2
  (need docker-compose docker-compose) ||
    echo "setup: going on without docker-compose: the tests of Compose are skipped" >&2
else
  # All but encrypted networks works without, and those say what they lack.
  (wireguard) || echo "setup: going on without wireguard-go: encrypted networks are refused" >&2
fi

if [ ! -x .venv/bin/python ]; then
  python=
  for name in python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$name
      break
    fi
  done
  [ -n "$python" ] || { echo "setup: Python 3.11 or later is missing. Install python3.11" >&2; exit 1; }
  "$python" -c 'import ensurepip, venv' 2>/dev/null || need no-such-command python3-venv
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

extra=
[ "$what" = dev ] && extra='[dev]'
stamp=.venv/.installed-$what
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  echo "setup: installing Python packages ($what)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
  touch "$stamp"
fi

if [ "$what" = dev ]; then
  # A plugin of somebody else's, run as it is by a test; what it needs is not to be among ours.
  stamp=.venv-plugins/.installed
  if [ ! -e "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "setup: installing kuryr-libnetwork"
    [ -x .venv-plugins/bin/python ] || .venv/bin/python -m venv .venv-plugins
    .venv-plugins/bin/python -m pip install --quiet --disable-pip-version-check \
      -c constraints.txt kuryr-libnetwork
    touch "$stamp"
  fi
fi
