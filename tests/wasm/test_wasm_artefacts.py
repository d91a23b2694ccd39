"""OCI layouts on disk: Wasm artefacts and ordinary images become roots; damaged and hostile ones are refused."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio
import pytest
from tests.wasm.sandboxes import engine, tool

from unisandbox import Engine, InvalidArgumentError, UnsupportedError
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.wasm import WasmBackend, artefacts
from unisandbox.backends.wasm.process import WasmProcessBackend
from unisandbox.engine.registry import Backend

pytestmark = [pytest.mark.anyio, pytest.mark.root]

WASM = "application/wasm"
OLD = "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm"
WASM_CONFIG = "application/vnd.wasm.config.v0+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
TAR = "application/vnd.oci.image.layer.v1.tar"
Layer = tuple[str, bytes, Mapping[str, str]]


class Layout:
    """Writes an OCI layout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, kind: str, data: bytes, **more: object) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data), **more}

    def document(self, kind: str, content: object, **more: object) -> dict[str, object]:
        return self.blob(kind, json.dumps(content).encode(), **more)

    def index(self, *entries: object) -> Path:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(entries)}))
        return self.path

    def image(
        self, config: object, layers: Sequence[Layer], *, kind: str = CONFIG, **more: object
    ) -> dict[str, object]:
        made = [self.blob(media, data, annotations=dict(notes)) for media, data, notes in layers]
        manifest = {"schemaVersion": 2, "config": self.document(kind, config), "layers": made}
        return self.document(MANIFEST, manifest, **more)


def tar(fill: Callable[[tarfile.TarFile], None]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        fill(archive)
    return buffer.getvalue()


def member(name: str, data: bytes | None = None, **fields: object) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data or b"")
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data) if data is not None else None)

    return add


def of(*members: Callable[[tarfile.TarFile], None]) -> bytes:
    def fill(archive: tarfile.TarFile) -> None:
        for add in members:
            add(archive)

    return tar(fill)


def wasip1(**process: object) -> dict[str, object]:
    return {"architecture": "wasm", "os": "wasip1", "config": process, "rootfs": {"type": "layers", "diff_ids": []}}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.mark.parametrize("kind", [WASM, OLD])
async def test_a_wasm_artefact_runs_by_the_name_of_its_module(wasm: Engine, layout: Layout, kind: str) -> None:
    config = {"architecture": "wasm", "os": "wasip1", "layerDigests": []}
    titled = (kind, tool(), {"org.opencontainers.image.title": "some/dir/echo.wasm"})
    path = layout.index(layout.image(config, [titled], kind=WASM_CONFIG))
    async with wasm.create(isolation="wasm", rootfs=path) as sandbox:
        assert (await sandbox.run(["/echo", "hi"])).text == "hi\n"
        assert (await sandbox.run(["echo.wasm", "hi"])).text == "hi\n"


async def test_a_module_without_a_title_is_main(wasm: Engine, layout: Layout) -> None:
    path = layout.index(layout.image({"architecture": "wasm", "os": "wasip1"}, [(WASM, tool(), {})], kind=WASM_CONFIG))
    async with wasm.create(isolation="wasm", rootfs=path) as sandbox:
        assert "main" in sorted(name.name.removesuffix(".wasm") for name in await sandbox.files.list("/"))


async def test_an_ordinary_image_is_its_layers_one_on_the_other(wasm: Engine, layout: Layout) -> None:
    first = of(
        member("bin/", type=tarfile.DIRTYPE, mode=0o755),
        member("bin/cat.wasm", tool(), mode=0o755),
        member("bin/env.wasm", type=tarfile.LNKTYPE, linkname="bin/cat.wasm"),
        member("bin/pwd.wasm", type=tarfile.SYMTYPE, linkname="cat.wasm"),
        member("./data/gone", b"gone"),
        member("data/kept", b"old"),
        member("opaque/old", b"old"),
        member("set-uid", b"x", mode=0o4777),
    )
    second = of(
        member("data/.wh.gone", b""),
        member("data/kept", b"new"),
        member("opaque/new", b"new"),
        member("opaque/.wh..wh..opq", b""),
    )
    settings = wasip1(Env=["FROM_IMAGE=yes", "BOTH=image"], WorkingDir="/data", Entrypoint=["/bin/cat.wasm"])
    other = layout.image({"architecture": "amd64", "os": "linux"}, [(TAR, of(), {})])
    entry = layout.image(settings, [(TAR, first, {}), (f"{TAR}+gzip", gzip.compress(second), {})])
    nested = layout.document(
        INDEX,
        {
            "manifests": [
                {**other, "platform": {"architecture": "amd64", "os": "linux"}},
                {**entry, "platform": {"architecture": "wasm", "os": "wasip1"}},
            ]
        },
    )
    path = layout.index(nested)
    async with wasm.create(isolation="wasm", rootfs=path, env={"BOTH": "user"}) as sandbox:
        assert (await sandbox.run(["/bin/cat.wasm", "/data/kept", "/opaque/new"])).text == "newnew"
        assert sorted(info.name for info in await sandbox.files.list("/data")) == ["kept"]
        assert sorted(info.name for info in await sandbox.files.list("/opaque")) == ["new"]
        assert (await sandbox.files.stat("/set-uid")).mode & 0o7000 == 0
        assert (await sandbox.run(["env", "FROM_IMAGE"])).text.strip() == "yes"
        assert (await sandbox.run(["env", "BOTH"])).text.strip() == "user"
        assert (await sandbox.run(["env", "PWD"])).text.strip() == "/data"


async def test_nothing_in_a_layer_leads_out(wasm: Engine, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("of the host")
    hostile = {
        "dots": of(member("../escaped", b"x")),
        "hard": of(member("l", type=tarfile.LNKTYPE, linkname=f"../../../../../../..{tmp_path}/outside/secret")),
        "device": of(member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
        "fifo": of(member("fifo", type=tarfile.FIFOTYPE)),
    }
    for name, layer in hostile.items():
        layout = Layout(tmp_path / name)
        path = layout.index(layout.image(wasip1(), [(TAR, layer, {})]))
        with pytest.raises(InvalidArgumentError):
            await wasm.create(isolation="wasm", rootfs=path)
    # A link is only text; what is written through it stays inside.
    layout = Layout(tmp_path / "through")
    through = of(
        member(f"{tmp_path}/outside/inner".lstrip("/"), b"x"),
        member("out", type=tarfile.SYMTYPE, linkname=str(tmp_path / "outside")),
        member("up", type=tarfile.SYMTYPE, linkname="../../../../../.."),
        member("out/secret", b"changed"),
        member(f"up{tmp_path}/outside/other", b"changed"),
        member("out/.wh.inner", b""),
    )
    path = layout.index(layout.image(wasip1(), [(TAR, through, {})]))
    async with wasm.create(isolation="wasm", rootfs=path) as sandbox:
        found = await sandbox.files.list(f"{tmp_path}/outside")
        assert sorted(info.name for info in found) == ["other", "secret"]
        assert (tmp_path / "outside" / "secret").read_text() == "of the host"
        assert os.listdir(tmp_path / "outside") == ["secret"]
    assert not (tmp_path / "escaped").exists()


def raw_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


HUGE = 64 << 20
TAR_GZIP = f"{TAR}+gzip"


@pytest.mark.parametrize(
    "archive",
    [
        raw_header(tarfile.GNUTYPE_LONGNAME, HUGE) + bytes(HUGE),
        raw_header(tarfile.GNUTYPE_LONGLINK, HUGE) + bytes(HUGE),
        raw_header(tarfile.XHDTYPE, HUGE) + bytes(HUGE),
        of(member(".wh.x", bytes(HUGE)), member("y", b"y")),
        raw_header(tarfile.GNUTYPE_LONGNAME, 0) * 10_000,
        b"".join(raw_header(tarfile.XGLTYPE, 512) + f"14 k{n:04}=vwxy\n".encode().ljust(512, b"\0")
                   + raw_header(tarfile.REGTYPE, 0) for n in range(100)),
    ],
    ids=["name", "link", "pax", "whiteout", "nested", "global"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [TAR, TAR_GZIP])
async def test_what_a_layer_says_about_its_files_is_bounded(
    wasm: Engine, layout: Layout, archive: bytes, kind: str
) -> None:
    """tarfile takes a header whole, and passes over what nobody wants in one call: gigabytes of a small blob."""
    blob = gzip.compress(archive, 1) if kind == TAR_GZIP else archive
    path = layout.index(layout.image(wasip1(), [(kind, blob, {})]))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError):
            await wasm.create(isolation="wasm", rootfs=path)
        assert tracemalloc.get_traced_memory()[1] < HUGE // 8
    finally:
        tracemalloc.stop()


async def test_a_layer_that_is_several_gzip_files_is_unpacked_whole(wasm: Engine, layout: Layout) -> None:
    """Tools that pack in parallel, or so that single files can be fetched, write such."""
    content = os.urandom(3 << 20)
    archive = of(member("first", content), member("n" * 200, b"long"), member("last", b"last"))
    pieces = [archive[at : at + 700_001] for at in range(0, len(archive), 700_001)]
    blob = b"".join(gzip.compress(piece, level) for piece, level in zip(pieces, (0, 1, 9, 6, 0, 1), strict=False))
    path = layout.index(layout.image(wasip1(), [(TAR_GZIP, blob, {})]))
    async with wasm.create(isolation="wasm", rootfs=path) as sandbox:
        assert await sandbox.files.read("/first") == content
        assert await sandbox.files.read("/" + "n" * 200) == b"long"
        assert await sandbox.files.read("/last") == b"last"


async def test_a_layer_that_unpacks_to_nothing_or_is_no_gzip_is_refused(wasm: Engine, tmp_path: Path) -> None:
    whole = gzip.compress(of(member("x", os.urandom(1 << 20))))
    hostile = {"empty": gzip.compress(b"") * 20_000, "cut": whole[: len(whole) // 2], "other": b"no gzip" * 100}
    for name, blob in hostile.items():
        layout = Layout(tmp_path / name)
        path = layout.index(layout.image(wasip1(), [(TAR_GZIP, blob, {})]))
        with pytest.raises(InvalidArgumentError):
            await wasm.create(isolation="wasm", rootfs=path)


@pytest.mark.parametrize("length", [257, 30_000])
async def test_a_number_that_tarfile_would_search_for_seconds_is_refused(
    wasm: Engine, layout: Layout, length: int
) -> None:
    archive = raw_header(tarfile.XHDTYPE, length) + (b"1" * length).ljust(-(-length // 512) * 512, b"\0")
    path = layout.index(layout.image(wasip1(), [(TAR, archive + of(member("y", b"y")), {})]))
    with pytest.raises(InvalidArgumentError, match="number"):
        await wasm.create(isolation="wasm", rootfs=path)


async def test_what_names_of_digits_a_layer_has_does_not_matter(wasm: Engine, layout: Layout) -> None:
    names = ["1" * 255, "/".join(["2" * 250] * 3)]
    archive = of(*(member(name, b"3" * 1000) for name in names))
    path = layout.index(layout.image(wasip1(), [(TAR, archive, {})]))
    async with wasm.create(isolation="wasm", rootfs=path) as sandbox:
        for name in names:
            assert await sandbox.files.read(f"/{name}") == b"3" * 1000


async def test_what_is_not_to_the_byte_what_was_promised_is_refused(wasm: Engine, tmp_path: Path) -> None:
    def changed(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    damages: tuple[Callable[[Path], None], ...] = (changed, cut, lambda blob: blob.unlink())
    for number, damage in enumerate(damages):
        for which in range(3):
            layout = Layout(tmp_path / f"l{number}{which}")
            path = layout.index(layout.image(wasip1(), [(TAR, of(member("x", b"x")), {})]))
            blobs = sorted((path / "blobs" / "sha256").iterdir())
            assert len(blobs) == 3
            damage(blobs[which])
            with pytest.raises(InvalidArgumentError, match="layout"):
                await wasm.create(isolation="wasm", rootfs=path)


async def test_what_is_no_image_for_wasm_is_refused(wasm: Engine, tmp_path: Path) -> None:
    layer: list[Layer] = [(TAR, of(member("x", b"x")), {})]
    linux = Layout(tmp_path / "linux")
    with pytest.raises(InvalidArgumentError, match="linux/amd64"):
        await wasm.create(
            isolation="wasm", rootfs=linux.index(linux.image({"architecture": "amd64", "os": "linux"}, layer))
        )
    component = Layout(tmp_path / "component")
    entry = component.image({"architecture": "wasm", "os": "wasip2"}, [(WASM, tool(), {})], kind=WASM_CONFIG)
    with pytest.raises(UnsupportedError, match=r"wasm\+process"):
        await wasm.create(isolation="wasm", rootfs=component.index(entry))
    empty = Layout(tmp_path / "empty")
    with pytest.raises(InvalidArgumentError):
        await wasm.create(isolation="wasm", rootfs=empty.index())
    (empty.path / "index.json").write_text("[" * 100_000)
    with pytest.raises(InvalidArgumentError):
        await wasm.create(isolation="wasm", rootfs=empty.path)


def artefact(path: Path) -> Path:
    """A layout with a module `echo.wasm`, like no other one."""
    layout = Layout(path)
    titled = (WASM, tool(), {"org.opencontainers.image.title": "echo.wasm", "of": str(path)})
    return layout.index(layout.image({"architecture": "wasm", "os": "wasip1"}, [titled], kind=WASM_CONFIG))


async def test_an_image_that_is_unpacked_holds_up_no_other(
    wasm: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = artefact(tmp_path / "slow"), artefact(tmp_path / "other")
    unpack = artefacts._Layout.unpack
    begun = anyio.Event()

    async def slowly(layout: artefacts._Layout, manifest: Mapping[str, object], root: int) -> Mapping[str, object]:
        if layout._path == str(slow):
            begun.set()
            await anyio.sleep_forever()
        return await unpack(layout, manifest, root)

    monkeypatch.setattr(artefacts._Layout, "unpack", slowly)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:

            async def begin() -> None:
                await wasm.create(isolation="wasm", rootfs=slow)

            group.start_soon(begin)
            await begun.wait()
            async with wasm.create(isolation="wasm", rootfs=other) as sandbox:
                assert (await sandbox.run(["/echo", "hi"])).text == "hi\n"
            group.cancel_scope.cancel()


@pytest.mark.parametrize("isolation", ["wasm", "wasm+process"])
async def test_of_images_that_nobody_uses_few_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolation: str
) -> None:
    monkeypatch.setattr(artefacts, "MOST_UNUSED", 1)
    backends: dict[str, Backend] = {"wasm": WasmBackend(), "wasm+process": WasmProcessBackend(), "runc": RuncBackend()}
    async with Engine.open(backends=backends) as opened:

        def there() -> int:
            host = opened._core.host
            return len(fnmatch.filter(os.listdir(host.disk_dir), f"unisandbox-{host.engine_id}-wasm-*"))

        paths = [artefact(tmp_path / f"layout{number}") for number in range(4)]
        made = [await opened.create(isolation=isolation, rootfs=path) for path in paths]
        again = await opened.create(isolation=isolation, rootfs=paths[0])
        assert there() == 4
        for sandbox, left in zip(made, (4, 4, 3, 2), strict=True):
            await sandbox.remove()
            assert there() == left  # the first one is used by two
        if isolation == "wasm":
            await opened.prefetch("/echo", isolation=isolation, rootfs=paths[1])
            assert there() == 2
        assert (await again.run(["/echo", "hi"])).text == "hi\n"


async def test_an_image_that_cannot_be_unpacked_leaves_nothing(wasm: Engine, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "bad")
    path = layout.index(layout.image(wasip1(), [(TAR, of(member("x", b"x"), member("../y", b"y")), {})]))
    with pytest.raises(InvalidArgumentError):
        await wasm.create(isolation="wasm", rootfs=path)
    host = wasm._core.host
    assert fnmatch.filter(os.listdir(host.disk_dir), f"unisandbox-{host.engine_id}-wasm-*") == []


async def test_an_image_is_unpacked_once_and_gone_with_the_engine(cache: Path, layout: Layout) -> None:
    path = layout.index(layout.image({"architecture": "wasm", "os": "wasip1"}, [(WASM, tool(), {})], kind=WASM_CONFIG))
    async with engine(cache) as opened:
        disk = opened._core.host.disk_dir  # what is left there is nobody's public business
        pattern = f"unisandbox-{opened._core.host.engine_id}-wasm-*"
        for _ in range(2):
            async with opened.create(isolation="wasm", rootfs=path) as sandbox:
                await sandbox.run(["/main", "x"])
            assert len(fnmatch.filter(os.listdir(disk), pattern)) == 1
    assert fnmatch.filter(os.listdir(disk), pattern) == []
