"""Specs as plain data: nothing is lost on the way there and back, and nothing unknown is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_contracts import ANYTHING

from unisandbox.api import (
    ContainerSpec,
    Dns,
    InvalidArgumentError,
    Mount,
    Network,
    ProcessSpec,
    Resources,
    Rootfs,
    SandboxSpec,
    Security,
    Terminal,
)
from unisandbox.api.names import CAPABILITIES
from unisandbox.api.plain import container_spec_of, plain, plain_given, process_spec_of, sandbox_spec_of

# Text of a command line: any but NUL, and bytes that are no UTF-8 as Python has them.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.just("\udcff"), max_size=6)
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
LINE = st.from_regex(r"[ -~\t]{0,6}", fullmatch=True)
PATH = TEXT.map(lambda text: f"/p{text}")
TARGET = st.from_regex(r"/m[a-z/]{0,6}", fullmatch=True)
WORD = st.from_regex(r"[A-Za-z0-9_.:%-]{1,8}", fullmatch=True)
ENV = st.dictionaries(TEXT.filter(lambda name: name and "=" not in name), TEXT, max_size=3)
SIZE = st.none() | st.integers(1 << 16, (1 << 62) - 1)
NUMBER = st.none() | st.floats(1e-3, 1e6) | st.integers(1, 1 << 20)
ADDRESS = st.ip_addresses().map(str)
MOUNT = st.builds(Mount, TARGET, PATH, readonly=st.booleans(), idmap=st.booleans()) | st.builds(
    Mount, TARGET, readonly=st.booleans(), size=SIZE
)
MOUNTS = st.lists(MOUNT, max_size=3, unique_by=lambda mount: mount.target)
ROOTFS = (
    st.builds(Rootfs.host, local=st.booleans())
    | st.builds(Rootfs, st.just("dir"), PATH, readonly=st.booleans())
    | st.builds(Rootfs.image, TEXT.filter(bool))
)
RESOURCES = st.builds(
    Resources,
    memory=SIZE,
    swap=SIZE,
    cpu=NUMBER,
    pids=st.none() | st.integers(1, 1 << 20),
    disk=SIZE | st.just(0),
    nofile=st.none() | st.integers(1, 1 << 20),
    core=SIZE,
)
PROCESS = st.builds(
    ProcessSpec,
    st.lists(TEXT.filter(bool), min_size=1, max_size=3),
    ENV,
    st.none() | PATH,
    st.none() | st.integers(0, 1 << 16),
    st.none() | st.builds(Terminal, st.integers(1, 0xFFFF), st.integers(1, 0xFFFF)),
)
CONTAINER = st.builds(
    ContainerSpec,
    NAME,
    st.none() | PROCESS,
    st.none() | ROOTFS,
    st.none() | RESOURCES,
    MOUNTS,
    ENV,
    PATH,
    st.none() | st.integers(0, 1 << 16),
)
SANDBOX = st.builds(
    SandboxSpec,
    isolation=NAME,
    name=st.none() | NAME,
    rootfs=ROOTFS,
    resources=RESOURCES,
    network=st.just(Network.none()) | st.just(Network.host()) | st.builds(Network.namespace, PATH),
    mounts=MOUNTS,
    env=ENV,
    cwd=PATH,
    user=st.none() | st.integers(0, 1 << 16),
    userns=st.sampled_from(["private", "host"]),
    hostname=st.none() | st.from_regex(r"[a-z0-9][a-z0-9.-]{0,9}", fullmatch=True),
    sysctls=st.dictionaries(st.from_regex(r"[a-z]{1,3}\.[a-z]{1,3}", fullmatch=True), LINE, max_size=2),
    dns=st.none() | st.builds(Dns, st.lists(ADDRESS, max_size=2), *[st.lists(WORD, max_size=2)] * 2),
    hosts=st.dictionaries(st.from_regex(r"[a-z.-]{1,5}", fullmatch=True), ADDRESS, max_size=2),
    security=st.builds(
        Security,
        st.sets(st.sampled_from(CAPABILITIES), max_size=4),
        st.sampled_from(["default", "unconfined"]),
        st.booleans(),
    ),
    share_pid=st.booleans(),
    ttl=NUMBER,
    labels=st.dictionaries(TEXT.filter(bool), TEXT, max_size=2),
    annotations=st.dictionaries(TEXT.filter(bool), TEXT, max_size=2),
)
KINDS: tuple[tuple[st.SearchStrategy[Any], Callable[[Mapping[str, object]], Any]], ...] = (
    (SANDBOX, sandbox_spec_of),
    (CONTAINER, container_spec_of),
    (PROCESS, process_spec_of),
)
BY_KIND = pytest.mark.parametrize(("specs", "spec_of"), KINDS, ids=["sandbox", "container", "process"])


@BY_KIND
@given(data=st.data())
def test_a_spec_is_the_same_after_json(
    specs: st.SearchStrategy[Any], spec_of: Callable[[Mapping[str, object]], Any], data: st.DataObject
) -> None:
    spec = data.draw(specs)
    assert spec_of(json.loads(json.dumps(plain(spec)))) == spec


@BY_KIND
@given(data=st.data())
def test_what_is_as_by_default_can_be_left_out(
    specs: st.SearchStrategy[Any], spec_of: Callable[[Mapping[str, object]], Any], data: st.DataObject
) -> None:
    spec = data.draw(specs)
    assert spec_of(json.loads(json.dumps(plain_given(spec)))) == spec


def test_only_what_is_not_as_by_default_is_given() -> None:
    """So a version with more fields says the same of what is asked for again."""
    assert plain_given(SandboxSpec()) == {}
    assert plain_given(ProcessSpec(["true"])) == {"argv": ["true"]}
    spec = SandboxSpec(name="w", resources=Resources(memory="64M"), mounts=[Mount.tmpfs("/a"), Mount.bind("/b", "/c")])
    assert plain_given(spec) == {
        "name": "w",
        "resources": {"memory": 64 << 20},
        "mounts": [{"target": "/a", "readonly": False, "size": 64 << 20}, {"target": "/c", "source": "/b"}],
    }


@BY_KIND
@given(data=st.data())
def test_a_strangers_data_is_a_spec_or_an_error(
    specs: st.SearchStrategy[Any], spec_of: Callable[[Mapping[str, object]], Any], data: st.DataObject
) -> None:
    given_data = plain(data.draw(specs))
    field = data.draw(st.sampled_from(sorted(given_data)))
    given_data[field] = data.draw(ANYTHING)
    try:
        made = spec_of(given_data)
    except InvalidArgumentError:
        return
    assert spec_of(plain(made)) == made


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"gpu": 1}, "'gpu' is not known"),
        ({"resources": {"memory": 1 << 20, "bandwidth": 1}}, "resources: the field 'bandwidth' is not known"),
        ({"mounts": [{"target": "/a", "propagation": "shared"}]}, "mounts: the field 'propagation' is not known"),
        ({"mounts": [{"source": "/a"}]}, "mounts: the field 'target' is missing"),
        ({"mounts": {"target": "/a"}}, "mounts must be a list"),
        ({"rootfs": "host"}, "rootfs: must be a mapping"),
        ({"rootfs": None}, "rootfs must be of type Rootfs"),
    ],
)
def test_what_a_later_version_may_have_written_is_named(change: Mapping[str, object], word: str) -> None:
    with pytest.raises(InvalidArgumentError, match=word):
        sandbox_spec_of({**plain(SandboxSpec()), **change})


def test_a_missing_field_has_its_default() -> None:
    assert sandbox_spec_of({}) == SandboxSpec()
    assert process_spec_of({"argv": ["true"]}) == ProcessSpec(["true"])


@pytest.mark.parametrize("pair", ["\ud83d\ude00", "\ud800"])
def test_no_label_can_become_another_in_json(pair: str) -> None:
    """Two halves of a surrogate pair would come back as one character."""
    for labels in ({"a": pair}, {pair: "a"}):
        with pytest.raises(InvalidArgumentError, match="encoded"):
            SandboxSpec(labels=labels)
