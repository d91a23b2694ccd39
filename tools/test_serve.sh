#!/usr/bin/env bash
# Runs the tests of the server with a real containerd, by a script that brings one up.
#
#   tools/test_serve.sh [PYTEST ARGUMENTS]
#
# The script is UNISANDBOX_CONTAINERD_LAB, by default ../shared/lab/containerd-lab.sh beside this repository. It is
# called as `containerd-lab.sh up`, `crictl ARGUMENTS...`, `ctr ARGUMENTS...`, `restart`, `status` and `down`; it builds
# once, which takes minutes and needs Go, and its runtime "uni" is the sandboxer at UNISANDBOX_SOCKET.
# critest is run by UNISANDBOX_CRITEST_LAB, by default critest/critest.sh beside it, called as `critest.sh up`,
# `critest RUNTIME ARGUMENTS...` and `down`; without it those tests are skipped.
#   UNISANDBOX_SERVE_OPTIONAL=1   end with 0 instead of 77 where there is none
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
lab=${UNISANDBOX_CONTAINERD_LAB:-$root/../shared/lab/containerd-lab.sh}
missing=""
[ "$(id -u)" = 0 ] || missing="we are not root"
[ -x "$lab" ] || missing="there is no script that brings up containerd at $lab"
command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
[ -n "$missing" ] || command -v go >/dev/null || missing="there is no Go to build it with"
if [ -n "$missing" ]; then
  echo "test-serve: skipped: $missing. Set UNISANDBOX_CONTAINERD_LAB to such a script, and install Go." >&2
  [ -n "${UNISANDBOX_SERVE_OPTIONAL:-}" ] && exit 0
  exit 77
fi
critest=${UNISANDBOX_CRITEST_LAB:-$(dirname "$lab")/critest/critest.sh}
[ ! -x "$critest" ] || export UNISANDBOX_CRITEST_LAB=$critest
export PATH UNISANDBOX_CONTAINERD_LAB=$lab UNISANDBOX_SOCKET=${UNISANDBOX_SOCKET:-/run/unisandbox/serve/sandboxer.sock}
"$lab" up && "$lab" down # builds it; each test brings up its own
cd "$root"
.venv/bin/python -m pytest --timeout 300 "${@:-tests/serve}"
