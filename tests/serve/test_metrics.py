"""What is used, in the messages of both versions of cgroups."""

from __future__ import annotations

from unisandbox.api import Metrics
from unisandbox.api.proto.io.containerd.cgroups import v1, v2
from unisandbox.serve.metrics import any_of
from unisandbox.wire import codec

USED = Metrics(memory_bytes=100, memory_limit_bytes=1000, memory_inactive_file_bytes=40, oom_kills=2, pids=3)


def test_engines_can_tell_the_working_set_from_page_cache() -> None:
    """Source: containerd, getWorkingSet and getWorkingSetV2 of internal/cri/server/container_stats_list.go."""
    old = codec.decode(v1.Metrics, any_of(USED, unified=False).value).memory
    assert old is not None
    assert old.usage is not None
    assert (old.usage.usage, old.usage.limit, old.total_inactive_file) == (100, 1000, 40)
    new = codec.decode(v2.Metrics, any_of(USED, unified=True).value).memory
    assert new is not None
    assert (new.usage, new.usage_limit, new.inactive_file) == (100, 1000, 40)
