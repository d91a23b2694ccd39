#!/usr/bin/env bash
# Runs the cgroup tests and the conformance of the namespace backend on a machine with cgroup v2 and systemd.
#
#   tools/test_v2.sh [PYTEST ARGUMENTS]      in place of the default list of tests
#
# On a host that has cgroup v2 and where we are root, the tests run here; else in a virtual machine (machine.sh).
#   UNISANDBOX_V2_OPTIONAL=1   end with 0 instead of 77 where there is neither
#   UNISANDBOX_V2_DIR          test this tree (default: the working copy, without what git ignores)
set -euo pipefail
# shellcheck source=tools/machine.sh
. "$(dirname "$0")/machine.sh"
tests=("$@")
emulated=()
if [ ${#tests[@]} = 0 ]; then
  # shellcheck disable=SC2207 # no blanks in these names
  tests=($(cd "$root" && echo tests/integration/test_cgroups*.py tests/unit/test_cgroups*.py))
  tests+=(--pyargs unisandbox.conformance --backend runc)
  emulated=(--slow-host)
fi

if [ -e /sys/fs/cgroup/cgroup.controllers ] && [ "$(id -u)" = 0 ]; then
  cd "$root" && exec .venv/bin/python -m pytest "${tests[@]}"
fi

need_vm test-v2 "this host has no cgroup v2 (or we are not root)" "${UNISANDBOX_V2_OPTIONAL:-}"
# Emulated, it is 10 to 20 times slower.
in_vm "${UNISANDBOX_V2_DIR:-}" 3600 --prepare "make setup" -- \
  .venv/bin/python -m pytest --color=no --timeout 900 --durations 25 "${emulated[@]}" "${tests[@]}"
