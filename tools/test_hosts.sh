#!/usr/bin/env bash
# Runs on a machine with cgroup v2 and systemd what a host program has there that is not simply root: as user id 1000 in a
# scope of a systemd user session, with a subtree of cgroups that was delegated to it; then, as root, services of
# systemd's, containers around the host program, and users whom root makes up. Emulated, about 20 minutes.
#
#   tools/test_hosts.sh [PYTEST ARGUMENTS]      in place of the default lists of tests, as the user
#
# The tests run in a virtual machine (machine.sh), whose script also has to know `--user`.
#   UNISANDBOX_HOSTS_OPTIONAL=1   end with 0 instead of 77 where there is none
#   UNISANDBOX_HOSTS_AS           "user" or "root": this part only, or as whom PYTEST ARGUMENTS are run
#   UNISANDBOX_HOSTS_DIR          test this tree (default: the working copy, without what git ignores)
#   UNISANDBOX_HOSTS_RESULTS      write the results (of the user's part) to this file, as JUnit XML, for
#                                 tools/hosts_table.py
set -euo pipefail
# shellcheck source=tools/machine.sh
. "$(dirname "$0")/machine.sh"
as=${UNISANDBOX_HOSTS_AS:-} tests=("$@") options=()

need_vm test-hosts "it tests another machine than this one" "${UNISANDBOX_HOSTS_OPTIONAL:-}"
if [ -z "$as$*" ]; then
  status=0
  UNISANDBOX_HOSTS_AS=user "$0" || status=$?
  UNISANDBOX_HOSTS_AS=root UNISANDBOX_HOSTS_RESULTS='' "$0" || status=$?
  exit "$status"
fi
case ${as:=user} in
  user)
    options=(--user)
    # What differs most from root's: ids, limits, ends and files.
    own=(tests/integration/test_rootless{,_refused,_files}.py tests/unit/test_subordinate.py tests/unit/test_inventory.py)
    for part in capabilities defaults exits limits isolation; do
      own+=("src/unisandbox/conformance/test_$part.py")
    done
    # And what a program does there in the place of the kernel; that is cut as it begins where it takes less time.
    served=tests/integration/test_served_layers.py
    own+=("$served" --deselect "$served::test_a_start_that_is_cut_leaves_no_helper")
    own+=(--by-turns --backend runc --slow-host)
    ;;
  root)
    network=tests/integration/test_user_network.py single=tests/integration/test_rootless_single.py
    own=(--by-turns tests/integration/test_systemd.py tests/integration/test_inside_containers.py)
    # Of users whom root makes up: what one id costs, and networks. The rest of both would take another half an hour.
    own+=("$single" --deselect "$single::test_the_contract_holds_with_one_id")
    own+=("$network::test_tcp_and_udp_reach_what_is_outside" "${network%.py}_rootless.py::test_an_ordinary_user_has_it_too")
    ;;
  *) echo "test-hosts: UNISANDBOX_HOSTS_AS is user or root, not $as" >&2 && exit 2 ;;
esac
[ ${#tests[@]} != 0 ] || tests=("${own[@]}")

results=${UNISANDBOX_HOSTS_RESULTS:-/dev/null}
: >"$results"
# The machine hands on nothing but its output: the results come at its end, before what it says of its own.
mark="##### results"
# shellcheck disable=SC2016 # it is for the shell over there
in_vm "${UNISANDBOX_HOSTS_DIR:-}" 3600 --prepare "make setup" "${options[@]}" -- \
  bash -c '"${@:2}" --junitxml /tmp/results.xml; s=$?; echo "$1"; cat /tmp/results.xml; echo; echo "$1 end"; exit $s' - "$mark" \
  .venv/bin/python -m pytest --color=no --timeout 900 --durations 10 "${tests[@]}" |
  # Line by line, as they come: mawk would wait until it has much of it.
  sed -u -e 's/\r$//' -e "/^$mark\$/,/^$mark end\$/ {" -e "/^$mark/d" -e "w $results" -e d -e '}'
