"""What an engine says of mounts, for a runtime that does not show what is mounted below."""

from __future__ import annotations

from unisandbox.oci.foreign import taken_apart


def test_a_mount_and_those_below_it_say_apart_what_it_said_of_all() -> None:
    ids = {"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}]}
    options = ["rbind", "rslave", "ro", "rnosuid", "ridmap"]
    mount = {"destination": "/v/", "type": "bind", "source": "/host/v", "options": options, **ids}
    below = [("/host/v/a b", ["rw", "noexec", "relatime", "shared:7"]), ("/host/v/a b/c", ["ro"])]
    assert list(taken_apart(mount, below)) == [
        {**mount, "options": ["bind", *options[1:]]},
        {
            "destination": "/v/a b",
            "type": "bind",
            "source": "/host/v/a b",
            "options": ["bind", "noexec", "nosuid", "rslave", "idmap"],
            **ids,
        },
        {
            "destination": "/v/a b/c",
            "type": "bind",
            "source": "/host/v/a b/c",
            "options": ["bind", "ro", "nosuid", "idmap"],
            **ids,
        },
    ]
    assert list(taken_apart({**mount, "options": ["rbind", "idmap"]}, below[1:]))[1] == {
        "destination": "/v/a b/c",
        "type": "bind",
        "source": "/host/v/a b/c",
        "options": ["bind", "ro"],
    }
