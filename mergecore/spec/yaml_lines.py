"""YAML (or JSON) text -> plain values that know the line of every key and value.

Reads what PyYAML's safe loader reads, with four differences: 1e-5 is a number, dates stay text, a key given twice is
an error, and the cost of reading is bounded (size, depth, nodes after aliases are expanded). Knows nothing of specs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from mergecore.spec.problems import UNREAD, Keys, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_NODES = 100_000
MAX_NUMBER = 500  # characters; PyYAML needs half a minute for a base-60 number of 1 MiB

_TAG = "tag:yaml.org,2002:"
_FLOAT_WITH_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class Mark(NamedTuple):
    """A place in the text; both numbers count from 1."""

    line: int
    column: int


@dataclass
class Document:
    """The value of a text, the places of its keys and values, and what could not be read.

    value is None if there is nothing to go on with. `values` has the places of scalars, list items and the whole;
    a mapping or list below a key is found at its key.
    """

    value: Any = None
    keys: dict[Keys, Mark] = field(default_factory=dict)
    values: dict[Keys, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line_of(self, keys: Keys, *, key_first: bool = False) -> int | None:
        """The line of a value (or of its key), or of the nearest thing around it that the text has."""
        first, second = (self.keys, self.values) if key_first else (self.values, self.keys)
        for n in range(len(keys), -1, -1):
            mark = first.get(keys[:n]) or second.get(keys[:n])
            if mark is not None:
                return mark.line
        return None


def read_yaml(text: str | bytes) -> list[Document]:
    """Read all documents of a text, one at least. Never raises for what the text holds: see Document.problems."""
    documents: list[Document] = []

    def refuse(message: str, line: int | None = None) -> list[Document]:
        return [Document(problems=[Problem((), message, line)])]

    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(data) > MAX_BYTES:
        return refuse(f"larger than {MAX_BYTES >> 20} MiB, which no spec is")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return refuse("not UTF-8 text", data.count(b"\n", 0, error.start) + 1)
    text = _json_tabs_to_spaces(text.removeprefix("\ufeff"))
    loader = None
    nodes = 0
    try:
        loader = _Loader(text)
        while loader.check_node():
            root = loader.get_node()
            if root is None or root.tag == _TAG + "null":
                continue  # a file may begin or end with ---
            document = Document()
            reader = _Reader(loader, document, nodes)
            document.value = reader.read(root, ())
            nodes = reader.nodes
            documents.append(document)
    except _Refused as error:
        return refuse(str(error.problem), _line(error.problem_mark))
    except yaml.MarkedYAMLError as error:
        return refuse(f"not valid YAML: {_syntax(error)}", _line(error.problem_mark or error.context_mark))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return refuse(f"not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed", line)
    except (ValueError, OverflowError, IndexError):
        # PyYAML's scanner lets these through, for "\UFFFFFFFF" and `%YAML 1.<5000 digits>` for example.
        return refuse("not valid YAML", loader.line + 1 if loader is not None else None)
    return documents or refuse("empty")


class _Refused(yaml.MarkedYAMLError):
    """Well-formed YAML beyond what is read here."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(problem=message, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe scanner, parser and resolver; nodes are counted while they are composed."""

    # Dates and '=' stay text: no key of a spec takes them, and a file name may look like a date.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TAG + "timestamp", _TAG + "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self.depth += 1
        self.nodes += 1
        _limit(self.depth, self.nodes, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(_TAG + "float", _FLOAT_WITH_EXPONENT, list("-+0123456789."))


class _Reader:
    """Nodes -> plain values. Aliases are followed, so the same node may be read at several places."""

    def __init__(self, loader: _Loader, document: Document, nodes: int) -> None:
        self.document = document
        self.nodes = nodes  # those of the documents before count as well
        self.open: set[int] = set()  # the nodes around the one being read: meeting one again is a cycle
        self.scalars = {
            _TAG + "str": lambda node: _joined_surrogates(node.value),
            _TAG + "int": loader.construct_yaml_int,
            _TAG + "float": loader.construct_yaml_float,
            _TAG + "bool": loader.construct_yaml_bool,
            _TAG + "null": lambda node: None,
        }

    def read(self, node: yaml.Node, keys: Keys) -> Any:
        self.nodes += 1
        _limit(len(keys) + 1, self.nodes, node.start_mark)
        if not keys or isinstance(keys[-1], int) or isinstance(node, yaml.ScalarNode):
            self.document.values[keys] = _mark(node)
        if id(node) in self.open:
            return self._unread(keys, "an anchor that contains itself", node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, keys)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            return self._unread(keys, f"the tag {_short(node.tag)} is not supported", node)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*keys, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, keys)
        finally:
            self.open.remove(id(node))

    def _scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        if node.tag not in self.scalars:
            return self._unread(keys, f"the tag {_short(node.tag)} is not supported", node)
        try:
            if node.tag != _TAG + "str" and len(node.value) > MAX_NUMBER:
                raise ValueError
            return self.scalars[node.tag](node)
        except (ValueError, KeyError, IndexError, OverflowError):
            what = "text" if node.tag == _TAG + "str" else f"a YAML {_short(node.tag).lstrip('!')}"
            hint = "" if node.tag == _TAG + "str" else "; put it in quotes if it is text"
            return self._unread(keys, f"cannot be read as {what}{hint}", node)

    def _mapping(self, node: yaml.Node, keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        own = sum(key.tag != _TAG + "merge" for key, _ in node.value)
        for i, (key, value) in enumerate(self._pairs(node, len(keys))):
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (*self.scalars, _TAG + "merge"):
                self._unread(keys, "a key must be plain text", key)
                continue
            try:
                name = _joined_surrogates(key.value)
            except ValueError:
                self._unread(keys, "a key cannot be read as text", key)
                continue
            here = (*keys, name)
            if name not in found:
                self.document.keys[here] = _mark(key)
                found[name] = self.read(value, here)
            elif i < own:
                first = self.document.keys[here].line
                message = f"given twice; the first is on line {first}"
                self.document.problems.append(Problem(here, message, _line(key.start_mark)))
        return found

    def _pairs(self, node: yaml.Node, depth: int) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """The pairs of a mapping, then those that its `<<` keys bring (to be used where the mapping has none)."""
        sources: list[tuple[yaml.Node, yaml.Node]] = []
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                sources += [(key, item) for item in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
            else:
                yield key, value
        for key, source in sources:
            self.nodes += 1
            _limit(depth + 1, self.nodes, key.start_mark)
            if not isinstance(source, yaml.MappingNode):
                self._unread((), "'<<' must name a mapping or a list of mappings", key)
            elif id(source) in self.open:
                self._unread((), "an anchor that contains itself", key)
            else:
                self.open.add(id(source))
                yield from self._pairs(source, depth + 1)
                self.open.remove(id(source))

    def _unread(self, keys: Keys, message: str, node: yaml.Node) -> Any:
        self.document.problems.append(Problem(keys, message, _line(node.start_mark)))
        return UNREAD


def _limit(depth: int, nodes: int, mark: yaml.Mark) -> None:
    if depth > MAX_DEPTH:
        raise _Refused(f"nested deeper than {MAX_DEPTH} levels", mark)
    if nodes > MAX_NODES:
        raise _Refused(f"more than {MAX_NODES} values (those that aliases repeat included)", mark)


def _mark(node: yaml.Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def _line(mark: yaml.Mark | None) -> int | None:
    return None if mark is None else mark.line + 1


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")[:60]


def _syntax(error: yaml.MarkedYAMLError) -> str:
    text = str(error.problem or error.context)
    if "'\\t'" in text:
        text += "; indent with spaces, not with tabs"
    elif error.context and error.problem and error.context_mark:
        text += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    return text


def _joined_surrogates(text: str) -> str:
    """JSON writes characters beyond U+FFFF as two escapes; a lone half is no character (ValueError)."""
    if re.search("[\ud800-\udfff]", text):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    return text


def _json_tabs_to_spaces(text: str) -> str:
    """JSON may be indented with tabs, YAML may not. In valid JSON a tab is never part of a string."""
    if "\t" in text and text.lstrip().startswith("{"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return text
        return text.replace("\t", " ")
    return text
