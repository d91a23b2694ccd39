#!/usr/bin/env bash
# Runs the cgroup tests and the conformance of the namespace backend on a machine with cgroup v2 and systemd.
#
#   tools/test_v2.sh [PYTEST ARGUMENTS]      in place of the default list of tests
#
# On a host that has cgroup v2 and where we are root, the tests run here; else in a virtual machine, by a script that
# boots one (UNISANDBOX_VM; by default ../shared/lab/vm.sh beside this repository). Such a script is called as
# `vm.sh --dir TREE --prepare COMMAND COMMAND...` and hands on output and exit status.
#   UNISANDBOX_V2_OPTIONAL=1   end with 0 instead of 77 where there is neither
#   UNISANDBOX_V2_DIR          test this tree (default: the working copy, without what git ignores)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tests=("$@")
if [ ${#tests[@]} = 0 ]; then
  # shellcheck disable=SC2207 # no blanks in these names
  tests=($(cd "$root" && echo tests/integration/test_cgroups*.py tests/unit/test_cgroups*.py))
  if compgen -G "$root/src/unisandbox/conformance/test_*.py" >/dev/null; then
    tests+=(--pyargs unisandbox.conformance --backend runc)
  fi
fi

if [ -e /sys/fs/cgroup/cgroup.controllers ] && [ "$(id -u)" = 0 ]; then
  cd "$root" && exec .venv/bin/python -m pytest "${tests[@]}"
fi

vm=${UNISANDBOX_VM:-$root/../shared/lab/vm.sh}
if [ ! -x "$vm" ]; then
  echo "test-v2: skipped: this host has no cgroup v2 (or we are not root), and there is no script that boots one at $vm." >&2
  echo "test-v2: Run it as root on a host with cgroup v2, or set UNISANDBOX_VM to such a script." >&2
  [ -n "${UNISANDBOX_V2_OPTIONAL:-}" ] && exit 0
  exit 77
fi

tree=${UNISANDBOX_V2_DIR:-}
if [ -z "$tree" ]; then
  tree=$(mktemp -d)
  trap 'rm -rf "$tree"' EXIT
  # Uncommitted work is tested too: what git knows and what it does not ignore.
  git -C "$root" ls-files -z --cached --others --exclude-standard | (cd "$root" && xargs -0 ls -d 2>/dev/null) |
    tar -C "$root" -cf - --no-recursion -T - | tar -C "$tree" -xf -
fi
# Emulated, it is 10 to 20 times slower.
"$vm" --dir "$tree" --prepare "make setup" --timeout 3600 .venv/bin/python -m pytest --color=no --timeout 900 "${tests[@]}"
