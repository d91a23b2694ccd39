#!/usr/bin/env bash
# Runs what an ordinary user has of the namespace backend on a machine with cgroup v2 and systemd: as user id 1000 in a
# scope of a systemd user session, with a subtree of cgroups that was delegated to it. Emulated, about 20 minutes.
#
#   tools/test_hosts.sh [PYTEST ARGUMENTS]      in place of the default list of tests
#
# The tests run in a virtual machine (machine.sh), whose script also has to know `--user`.
#   UNISANDBOX_HOSTS_OPTIONAL=1   end with 0 instead of 77 where there is none
#   UNISANDBOX_HOSTS_DIR          test this tree (default: the working copy, without what git ignores)
#   UNISANDBOX_HOSTS_RESULTS      write the results to this file, as JUnit XML, for tools/hosts_table.py
set -euo pipefail
# shellcheck source=tools/machine.sh
. "$(dirname "$0")/machine.sh"
tests=("$@")
if [ ${#tests[@]} = 0 ]; then
  tests=(tests/integration/test_rootless.py tests/unit/test_subordinate.py tests/unit/test_inventory.py)
  # What differs most from root's: ids, limits, ends and files.
  for part in capabilities defaults exits limits isolation; do
    tests+=("src/unisandbox/conformance/test_$part.py")
  done
  tests+=(--backend runc)
fi

need_vm test-hosts "it tests another machine than this one" "${UNISANDBOX_HOSTS_OPTIONAL:-}"
results=${UNISANDBOX_HOSTS_RESULTS:-/dev/null}
: >"$results"
# The machine hands on nothing but its output: the results come at its end.
mark="##### results"
# shellcheck disable=SC2016 # it is for the shell over there
in_vm "${UNISANDBOX_HOSTS_DIR:-}" 3600 --prepare "make setup" --user -- \
  bash -c '"${@:2}" --junitxml /tmp/results.xml; status=$?; echo "$1"; cat /tmp/results.xml; exit $status' - "$mark" \
  .venv/bin/python -m pytest --color=no --timeout 900 --durations 10 --slow-host "${tests[@]}" |
  # Line by line, as they come: mawk would wait until it has much of it.
  sed -u -e 's/\r$//' -e "/^$mark\$/,\$ {" -e "/^$mark\$/d" -e "w $results" -e d -e '}'
