"""docs/events.md names every kind of notice that is told, and none that is not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED_ON = {"kind"}  # an argument that the caller chose: `tell` itself, and what wraps it

ANOTHER = "stability.tell"  # a method of that name which tells nobody anything


def told_in(source: str) -> Iterator[str]:
    """The kinds that a module tells: first arguments of `.tell(…)` and `Notice(…)`.

    Those are strings, or looked up in a dict of strings of the module. AssertionError for
    anything else: this test could not follow it.
    """
    tree = ast.parse(source)
    tables: dict[str, list[str]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            values = [ast.literal_eval(v) for v in statement.value.values if _is_text(v)]
            tables[ast.unparse(statement.targets[0])] = values
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if name == "_tell" and _is_text(node.args[0]):
            yield ast.literal_eval(node.args[0])
        if name not in ("tell", "Notice") or ast.unparse(node.func).endswith(ANOTHER):
            continue
        kind = node.args[0]
        if _is_text(kind):
            yield ast.literal_eval(kind)
        elif isinstance(kind, ast.Subscript):
            yield from tables[ast.unparse(kind.value)]
        else:
            assert ast.unparse(kind) in PASSED_ON, f"which kind is {ast.unparse(node)}?"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def told() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "agent").rglob("*.py"):
        if "rpc" not in file.parts:
            found.update(told_in(file.read_text()))
    return found


def documented() -> set[str]:
    text = (ROOT / "docs/events.md").read_text().split("## Notices", 1)[1].split("\n## ")[0]
    rows = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", text, re.M)
    return {kind for row in rows for kind in re.findall(r"`([\w.]+)`", row)}


def test_every_kind_that_is_told_is_documented_and_the_other_way_round() -> None:
    assert told() - documented() == set(), "lacking in docs/events.md"
    assert documented() - told() == set(), "in docs/events.md, and told nowhere"


def test_kinds_are_found_where_they_are_told() -> None:
    source = "K = {1: 'a.b', 2: 'c.d'}\nx.tell(K[1], 'm')\nNotice('e.f', 'm', {})\ntell(kind, 'm')"
    assert set(told_in(source)) == {"a.b", "c.d", "e.f"}
    assert {"drift.repaired", "member.dead", "space.low"} <= told()
