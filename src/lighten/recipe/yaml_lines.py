"""YAML with the line of every key, numbers as people write them, and no key twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lighten.errors import UserError


class _Loader(yaml.SafeLoader):
    """The safe loader, except that `1e-4` is a number (YAML 1.1 wants `1.0e-4`).

    A key is what was written: YAML 1.1 reads `no` as false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """The value that YAML text stands for."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader with one more number form


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings of a recipe file, and the line of each top-level or nested key (dotted).

    Raises:
        UserError: Not there, not YAML, not a mapping, or a key stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; is it a recipe?") from error
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        if isinstance(tree, yaml.MappingNode):
            _collect(tree, "", lines, path)  # before merge keys are put into the tree
        values = None if tree is None else loader.construct_document(tree)
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        if "another document" in reason:
            reason = "a second document begins there; a recipe is one, remove the ---"
        raise UserError(f"{location} is not valid YAML: {reason}") from error
    except (ValueError, RecursionError) as error:  # 2026-13-45 reads as a date
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else str(error)
        raise UserError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(values, dict) or not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path} is not a recipe: it must hold settings as `name: value` lines")
    return values, lines


def _collect(node: yaml.MappingNode, prefix: str, lines: dict[str, int], path: Path) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            raise UserError(
                f"{path}:{key.start_mark.line + 1}: {name} stands twice, first on line "
                f"{lines[name]}; keep one"
            )
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            _collect(value, f"{name}.", lines, path)
        elif isinstance(value, yaml.SequenceNode):
            for place, entry in enumerate(value.value):
                if isinstance(entry, yaml.MappingNode):
                    _collect(entry, f"{name}.{place}.", lines, path)
