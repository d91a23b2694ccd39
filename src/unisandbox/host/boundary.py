"""Named points right before and right after each side effect that outlives this process.

They do nothing but let a test in: it ends the process, or the keeper, at each of them and looks at what becomes of it.
A name reads as what is about to happen, or has happened. Standard library only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_hook: Callable[[str, str], None] | None = None


def reached(name: str, of: str = "") -> None:
    """This point is reached.

    Args:
        name: a literal, so that a test can list all points from the source; a "*" in it stands for `of`.
        of: what is changed: a path, an id.
    """
    if _hook is not None:
        _hook(name, of)


def watch(hook: Callable[[str, str], None] | None) -> None:
    """Let a test hear of every point of this process; None: no more."""
    global _hook  # noqa: PLW0603 (points lie in functions that know of no object of the test)
    _hook = hook
