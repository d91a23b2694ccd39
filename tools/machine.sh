# The common part of test_v2.sh and test_hosts.sh: tests on another machine, a virtual one. To be sourced.
#
# A script boots it (UNISANDBOX_VM; by default ../shared/lab/vm.sh beside this repository). Such a script is called as
# `vm.sh --dir TREE --prepare COMMAND [--user] COMMAND...` and hands on output and exit status.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
vm=${UNISANDBOX_VM:-$root/../shared/lab/vm.sh}

# need_vm NAME WHY OPTIONAL: ends the run where there is no such script, with 77, or with 0 where that is optional.
need_vm() {
  [ -x "$vm" ] && return
  echo "$1: skipped: $2, and there is no script that boots another one at $vm." >&2
  echo "$1: Set UNISANDBOX_VM to such a script." >&2
  [ -n "$3" ] && exit 0
  exit 77
}

# in_vm TREE SECONDS [OPTIONS OF vm.sh...] -- COMMAND...: TREE may be empty, then it is the working copy.
in_vm() {
  local tree=$1 seconds=$2 options=()
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  if [ -z "$tree" ]; then
    tree=$(mktemp -d)
    chmod 755 "$tree"  # over there other users than its owner look into it, too
    # shellcheck disable=SC2064 # its name as it is now
    trap "rm -rf '$tree'" EXIT
    # Uncommitted work is tested too: what git knows and what it does not ignore.
    git -C "$root" ls-files -z --cached --others --exclude-standard | (cd "$root" && xargs -0 ls -d 2>/dev/null) |
      tar -C "$root" -cf - --no-recursion -T - | tar -C "$tree" -xf -
  fi
  "$vm" --dir "$tree" --timeout "$seconds" "${options[@]}" "$@"
}
