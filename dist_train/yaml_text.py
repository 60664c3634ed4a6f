"""How a file of YAML is read: no key twice, 1e-3 a number, text kept as it is written, a mistake told in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from dist_train.errors import UseError


def read_yaml(path: Path, text_keys: Collection[str]) -> Any:
    """What a file holds. text_keys: `section.key` of those whose values are text, whatever they look like.

    Raises UseError, naming the line, where it is no YAML or a key stands twice in a mapping; OSError.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            _keep_text(loader, root, text_keys)
        return None if root is None else loader.construct_document(root)
    except _Repeated as error:
        raise UseError(f"{path}, {error}") from None
    except yaml.MarkedYAMLError as error:
        raise UseError(f"{path}{_place_and_problem(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UseError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


class _Repeated(yaml.YAMLError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys, in which 1e-3 is a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        # Before `<<` is resolved: what a mapping takes from another it may well have itself.
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _Repeated(f"line {line}: '{key.value}' is there already, in line {lines[key.value]}; keep one")
            if isinstance(key, yaml.ScalarNode):
                # PyYAML 6.0.4 takes the last of two merged mappings with a key, not the first, unless it is one object.
                key.value = sys.intern(key.value)
                lines[key.value] = line
        return node


# YAML 1.1 wants a point in it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _keep_text(loader: _Loader, root: yaml.MappingNode, keys: Collection[str]) -> None:
    """Keep what is written for `keys` as it is: a digest of digits is no number, nor is `freeze: 3`."""
    loader.flatten_mapping(root)
    for section, entries in root.value:
        if not isinstance(entries, yaml.MappingNode):
            continue
        loader.flatten_mapping(entries)
        for i, (key, value) in enumerate(entries.value):
            if f"{section.value}.{key.value}" in keys and isinstance(value, yaml.ScalarNode):
                if value.tag.rpartition(":")[2] in ("int", "float", "bool", "timestamp"):
                    text = yaml.ScalarNode("tag:yaml.org,2002:str", value.value, value.start_mark, value.end_mark)
                    entries.value[i] = (key, text)


def _place_and_problem(error: yaml.MarkedYAMLError) -> str:
    """Where a file is no YAML, and why; PyYAML needs four lines for it."""
    problem, mark = error.problem or "", error.problem_mark
    cure = ""
    if r"'\t'" in problem:
        cure = "; indent with blanks, not with a tab"
    elif "expected <block end>" in problem:
        cure = "; is it indented as the keys above it?"
    return f"{f', line {mark.line + 1}' if mark else ''}: not YAML ({problem}){cure}"
