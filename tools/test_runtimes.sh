#!/usr/bin/env bash
# Runs the conformance of the namespace backend, and the tests of the runtimes' driver, with one OCI runtime at a time.
#
#   tools/test_runtimes.sh [PATH...]      programs; by default the crun, runc and youki that are here
#
# No other runtime is to be seen while one is tested: in a mount namespace of the test run, which needs root. The results
# go to build/runtimes/NAME-VERSION.xml, for tools/hosts_table.py. How to get one that is newer than the distribution's:
#   go install -tags seccomp github.com/opencontainers/runc@v1.5.3                     (needs libseccomp-dev, pkg-config)
#   cargo install youki --no-default-features --features v1,v2,seccomp                 (the same)
# A crun of another release of Debian needs the libc of that: `patchelf --set-interpreter ... --force-rpath --set-rpath`
# lets it find both in a directory.
#   UNISANDBOX_RUNTIMES_TESTS     which tests, in place of the default ones
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "test-runtimes: needs root: what is mounted hides the other runtimes" >&2 && exit 77; }
read -ra tests <<<"${UNISANDBOX_RUNTIMES_TESTS:-}"
if [ ${#tests[@]} = 0 ]; then
  tests=(tests/integration/test_runtime.py tests/integration/test_task_service.py tests/integration/test_adapted_bundles.py)
  tests+=(--pyargs unisandbox.conformance --backend runc)
fi
# As `make test` has it: a file to a worker, and the long ones on one of the two event loops.
shared=(-n "$(nproc)" --dist loadfile --no-loadscope-reorder --by-turns)
places=(/usr/local/sbin /usr/local/bin /usr/sbin /usr/bin)
known=(crun runc youki)
given=("$@")
if [ ${#given[@]} = 0 ]; then
  for name in "${known[@]}"; do
    ! program=$(command -v "$name") || given+=("$program")
  done
fi

# Over there: $1 the program, $2 its name, the rest is the command.
# shellcheck disable=SC2016 # it is for the shell over there
only='
  program=$1 name=$2 && shift 2
  exec 9<"$program" # what hides the others may hide this one; it is of a file system that can map ids
  for place in '"${places[*]}"'; do
    for each in '"${known[*]}"'; do
      [ ! -f "$place/$each" ] || [ "$(realpath "$place")" != "$place" ] || mount --bind build/runtimes/none "$place/$each"
    done
  done
  mount -t tmpfs -o mode=755 tmpfs /usr/local/sbin
  cat <&9 >"/usr/local/sbin/$name" && chmod 755 "/usr/local/sbin/$name"
  exec 9<&-
  PATH=/usr/local/sbin:$PATH exec "$@"'

mkdir -p build/runtimes && : >build/runtimes/none
failed=()
for program in "${given[@]}"; do
  said=$("$program" --version)
  read -r name _ version _ <<<"${said/version:/version}"
  echo "test-runtimes: $name $version ($program)"
  unshare --mount --propagation slave bash -euc "$only" - "$(realpath "$program")" "$name" \
    .venv/bin/python -m pytest -q "${shared[@]}" --junitxml "build/runtimes/$name-$version.xml" "${tests[@]}" ||
    failed+=("$name $version")
done
[ ${#failed[@]} = 0 ] || { printf 'test-runtimes: failed with %s\n' "${failed[@]}" && exit 1; }
