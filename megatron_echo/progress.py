"""A progress bar for long work on the host; nothing that trains uses it."""

import sys
from collections.abc import Iterable, Iterator


def track[T](items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Go through ``items``, with a bar on standard error where that is a terminal.

    The bar goes away at the end. Without ``rich`` (the extra ``report``) there is none. What is
    printed meanwhile goes where it would go without a bar. ``description`` says in two or three
    words what is done, ``total`` how many items there are, where ``len(items)`` does not.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from items
        return
    # rich would send prints to its own stream, out of a file that standard output goes to.
    is_shared = sys.stdout.isatty()
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=is_shared) as bar:
        yield from bar.track(items, total=total, description=description)
