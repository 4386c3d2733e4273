"""Parse YAML that others wrote: no key twice, and no more values than a reader can go through.

values = parse(path.read_bytes())

With aliases (`*a`), 400 bytes name 10^9 values. They are counted before any value is made.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 2_000_000
"""Values of a text with its aliases written out, at most. Our longest file has 1,500."""


# libyaml is 20 times as fast, and refuses deep nesting, for which PyYAML's own scanner takes quadratic time.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(_Loader):  # type: ignore[misc]
    """Refuses a key that is given twice. PyYAML keeps the last value and loses the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict, set)):
                continue  # the base class refuses these
            if key in seen:
                problem = f"key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


def parse(data: bytes | str, *, strict: bool = True) -> Any:
    """Return the value of a YAML text.

    Args:
        data: the text.
        strict: whether a key that is given twice is refused. Cards of the hub have such keys.

    Raises:
        ValueError: it is no YAML, gives a key twice, is nested too deeply, or its aliases have no end.
    """
    try:
        loader = (_StrictLoader if strict else _Loader)(data)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > MOST_VALUES:
                raise ValueError(
                    f"more than {MOST_VALUES:,} values, as its aliases (*) repeat them"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return the number of values below a node, aliases written out.

    Args:
        node: of the text.
        counted: id of a node -> its values; 0 while they are counted, so a node inside itself has no end.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    known = counted.get(id(node))
    if known is not None:
        return known or MOST_VALUES + 1
    counted[id(node)] = 0
    below = [part for pair in node.value for part in pair] if _is_mapping(node) else node.value
    counted[id(node)] = total = 1 + sum(_values(part, counted) for part in below)
    return total


def _is_mapping(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode)
