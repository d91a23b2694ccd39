"""Every example of README and docs runs, every link leads somewhere, every program in examples/ works.

A block of ```python is a whole program (a top-level `await` is allowed, as in a notebook). In a block of ```console the
lines after `$ ` are run by a shell and must succeed, or end with the status that a comment `# exit status N` names.
A block that cannot run here says why on the line before it: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->\n\Z")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
EXIT_STATUS = re.compile(r"#\s*exit status (\d+)\s*$")
RUNNABLE = ("unisandbox ", "python ", "make help")

RUN_WITH_AWAIT = """
import ast, asyncio, inspect, sys
code = compile(sys.stdin.read(), sys.argv[1], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
names = {"__name__": "__main__"}
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(eval(code, names))
else:
    exec(code, names)
"""


class Block(NamedTuple):
    where: str
    language: str
    text: str
    why_not_run: str


def _blocks() -> list[Block]:
    found: list[Block] = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            reason = NOT_RUN.search(text[: match.start()])
            line = text.count("\n", 0, match.start()) + 1
            where = f"{page.relative_to(ROOT)}:{line}"
            found.append(Block(where, match["language"], match["text"], reason["reason"] if reason else ""))
    return found


def _params(language: str) -> list[object]:
    return [
        pytest.param(
            block,
            id=block.where,
            marks=[pytest.mark.skip(reason=f"the page says: {block.why_not_run}")] if block.why_not_run else [],
        )
        for block in _blocks()
        if block.language == language
    ]


# A block may compile CPython to machine code, which takes a loaded machine minutes.
SECONDS = 400


def _run(argv: list[str], directory: Path, **options: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONWARNINGS": "error", "UNISANDBOX_STATE": options.get("state", "")}
    return subprocess.run(
        argv,
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        input=options.get("input"),
    )


@pytest.mark.root
@pytest.mark.parametrize("block", _params("python"))
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    done = _run([sys.executable, "-c", RUN_WITH_AWAIT, block.where], tmp_path, input=block.text)
    assert done.returncode == 0, f"{block.where} failed:\n{done.stdout}{done.stderr}"


@pytest.mark.root
@pytest.mark.parametrize("block", _params("console"))
def test_console_block_runs(block: Block, tmp_path: Path) -> None:
    commands = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    assert commands, f"{block.where}: a console block without a line that starts with '$ '"
    for command in commands:
        assert f"{command} ".startswith(RUNNABLE), f"{block.where}: say why this is not run, or use ```text: {command}"
        expected = EXIT_STATUS.search(command)
        done = _run(["sh", "-c", command], ROOT, state=str(tmp_path / "state"))
        assert done.returncode == (int(expected[1]) if expected else 0), f"{command}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for match in LINK.finditer(FENCE.sub("", page.read_text())):
        target = match["target"].split("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_the_unit_on_the_page_is_the_one_that_is_tried() -> None:
    unit = (ROOT / "examples/service/worker.service").read_text()

    assert unit in (ROOT / "docs/systemd.md").read_text()
