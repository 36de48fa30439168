"""YAML 1.2 without surprises: text, numbers, booleans, null, lists and mappings."""

import re
from typing import Any

import yaml

from unlearn_llm.errors import RecipeError

# YAML 1.2 and no more. 1.1 reads `no` as false, `1e-5` as text, `010` as 8 and `1:30` as 90.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        "-+0123456789.",
    ),
)


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, keys that are not text, aliases and tags."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  filled below

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not read; write the value out"
        elif event.tag is not None:
            problem = f"tags are not read; got {event.tag}"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"expected a key that is text, got {key!r}"
            elif key in seen:
                problem = f"the key {key!r} stands twice"
            else:
                seen.add(key)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text; puts small leaves on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: Any, mapping: Any, flow_style: Any = None) -> Any:
        return super().represent_mapping(tag, mapping, _is_small(mapping))

    def represent_sequence(self, tag: Any, sequence: Any, flow_style: Any = None) -> Any:
        return super().represent_sequence(tag, sequence, _is_small(sequence))


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def _is_small(content: Any) -> bool:
    parts = content.values() if isinstance(content, dict) else content
    has_parts = any(isinstance(part, dict | list) and part for part in parts)
    return not has_parts and len(str(content)) <= 70


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML as numbers, text, booleans, null, lists and mappings; nothing else.

    Raises:
        RecipeError: naming file and line.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        advice = " Indent with blanks." if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"{where}{line}: {error.problem}.{advice}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}.") from error


def dump_yaml(document: Any) -> str:
    """Write YAML that `parse_yaml` reads back as it was; order kept."""
    return str(
        yaml.dump(
            document,
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=100,
        )
    )
