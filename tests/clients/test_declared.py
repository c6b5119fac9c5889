"""What messages call a resource, and the line that declares it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from asyncguard import Shared, shared

plain = shared(dict[str, int])  # plain
annotated: Shared[Any] = shared(dict[str, int])
named = shared(dict[str, int], name="another")
over_lines = shared(  # over lines
    dict[str, int],
    one=1,
    two=2,
)


class Namespace:
    attribute = shared(dict[str, int])


def make() -> Shared[Any]:
    return shared(partial(partial(Namespace)))


def test_it_is_called_by_its_variable() -> None:
    local = shared(dict[str, int])
    assert plain.name == "plain"
    assert annotated.name == "annotated"
    assert named.name == "another"
    assert over_lines.name == "over_lines"
    assert Namespace.attribute.name == "attribute"
    assert local.name == "local"
    used = shared(dict[str, int])
    assert used.name == "used"  # on Python 3.13, one instruction stores and loads it

    def closure() -> str:
        return enclosed.name

    enclosed = shared(dict[str, int])
    assert closure() == "enclosed"


def test_without_a_variable_it_is_called_by_its_factory() -> None:
    kept = [shared(dict[str, int])]
    assert kept[0].name == "dict"
    assert make().name == "Namespace"

    class Factory:
        def __call__(self) -> int:
            return 1

    assert [shared(Factory())][0].name.endswith("Factory")


def test_the_line_that_declares_it(marked: Callable[[str], int]) -> None:
    assert plain.declared.line == marked("plain")
    assert plain.declared.file.endswith("test_declared.py")
    assert over_lines.declared.line == marked("over lines")
    assert f"{plain.declared.file}:{plain.declared.line}" in str(plain)
    assert repr(plain) == f"<Shared 'plain', declared at {plain.declared.file}:{plain.declared.line}>"


def test_no_argument_is_told() -> None:
    """The line may have a password in it."""
    database = shared(dict[str, str], password="secret")
    assert "secret" not in repr(database) + str(database) + repr(database.declared) + repr(database.status)


@pytest.mark.parametrize("code", ["resource = shared(dict)", "x, y = shared(dict), 1", "shared(dict).name"])
def test_code_without_a_file(code: str) -> None:
    namespace: dict[str, Any] = {"shared": shared}
    exec(code, namespace)
    if "resource" in namespace:
        assert namespace["resource"].name == "resource"
        assert namespace["resource"].declared.file == "<string>"
