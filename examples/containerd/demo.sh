#!/usr/bin/env bash
# One pod with one container by crictl, from beginning to end.
#
#   demo.sh IMAGE      an image with a shell that the node has: see `crictl images`
set -euo pipefail
image=${1:?IMAGE}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

cat > "$place/pod.json" <<J
{
  "metadata": {"name": "demo", "namespace": "default", "uid": "demo-$$"}, "hostname": "demo", "log_directory": "$place",
  "linux": {"security_context": {"namespace_options": {"pid": 1}}}
}
J
cat > "$place/container.json" <<J
{
  "metadata": {"name": "main"}, "image": {"image": "$image"}, "log_path": "main.log",
  "command": ["sh", "-c", "echo hello from \$(hostname); exec sleep 1000"],
  "linux": {
    "security_context": {"namespace_options": {"pid": 1}},
    "resources": {"memory_limit_in_bytes": 67108864, "cpu_quota": 50000, "cpu_period": 100000}
  }
}
J

pod=$(crictl runp --runtime unisandbox "$place/pod.json")
container=$(crictl create "$pod" "$place/container.json" "$place/pod.json")
crictl start "$container" > /dev/null
until crictl logs "$container" | grep . ; do sleep 0.1; done
crictl exec --sync "$container" sh -c 'echo "the first of its processes: $(cat /proc/1/comm)"'
crictl update --memory 134217728 "$container" > /dev/null
crictl stats --output json "$container" | grep -A 1 availableBytes
crictl rmp --force "$pod" > /dev/null
echo "pods left: $(crictl pods --quiet --name demo | grep -c . || true)"
