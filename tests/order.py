"""Which tests a worker of pytest-xdist takes as one, and which come first (`--dist loadgroup`)."""

from __future__ import annotations

from collections import Counter

import pytest

GROUP = "xdist_group"


def arrange(items: list[pytest.Item]) -> None:
    """The tests of a file share what one of them made (captures, lowered programs, fixtures of the module), so one
    worker takes them all, unless they have a group of their own. Slow ones go one by one and before all others, so that
    none is left when the other worker has nothing to do; then the groups, large ones first.
    """
    for item in items:
        if not alone(item) and item.get_closest_marker(GROUP) is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    sizes = Counter(group(item) for item in items)
    items.sort(key=lambda item: (not alone(item), -sizes[group(item)]))


def alone(item: pytest.Item) -> bool:
    return item.get_closest_marker(GROUP) is None and item.get_closest_marker("slow") is not None


def group(item: pytest.Item) -> str:
    mark = item.get_closest_marker(GROUP)
    return "" if mark is None else str(mark.args[0])
