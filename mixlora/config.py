"""YAML and `a.b=value` overrides -> nested dataclasses, strictly. Knows no field name.

Every value carries the place it came from until its type is checked, so that each error names
the key and the line. A field whose metadata has `inherits=("x", "y")` holds a list of mappings
that take the keys x and y of the enclosing mapping where they do not set them themselves.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mixlora.errors import InputError, did_you_mean

Config = TypeVar("Config")

PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
MAX_NODES = 10_000  # aliases of aliases of aliases can stand for more than any memory holds


@dataclass
class Located:
    """A scalar, or a dict or list of Located, and where it was written."""

    value: Any
    where: str


def load(
    cls: type[Config],
    path: str | Path,
    overrides: typing.Sequence[str] = (),
    translate: Callable[[Located], Located] = lambda tree: tree,
) -> Config:
    """The config in a YAML file, with `a.b=value` overrides (values are YAML) applied in order.

    `translate` is what a foreign config goes through first.
    """
    tree = translate(read(path))
    for override in overrides:
        _apply(tree, override)
    return build(cls, tree)


def read(path: str | Path) -> Located:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot be read: {error}") from None
    return _parse(text, str(path)) or Located({}, str(path))


def locate(value: Any, where: str) -> Located:
    """A plain value (from JSON, say) as a tree whose every part was written at `where`."""
    if isinstance(value, dict):
        return Located({str(k): locate(v, where) for k, v in value.items()}, where)
    if isinstance(value, list):
        return Located([locate(item, where) for item in value], where)
    return Located(value, where)


def to_yaml(config: Any) -> str:
    """ASCII: of what lies beyond it, YAML reads some characters back as others."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def differences(before: Any, after: Any, key: str = "") -> dict[str, str]:
    """key -> "was x, is y" for every value in which two configs, or what they hold, differ."""
    if dataclasses.is_dataclass(before) and type(before) is type(after):
        names = [field.name for field in dataclasses.fields(before)]
        pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(before, after, strict=True))]
    else:
        return {} if before == after else {key: f"was {before!r}, is {after!r}"}
    inner = [differences(a, b, _join(key, name)) for name, a, b in pairs]
    return {key: change for changes in inner for key, change in changes.items()}


def build(cls: type[Config], tree: Located, key: str = "") -> Config:
    """A dataclass from a mapping: unknown, missing and ill-typed keys are errors."""
    if not isinstance(tree.value, dict):
        raise InputError(f"{tree.where}: {_named(key)} must be a mapping, got {_show(tree)}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, node in tree.value.items():
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise InputError(f"{node.where}: unknown key '{_join(key, name)}'{hint}")
        for inherited in fields[name].metadata.get("inherits", ()):
            _inherit(node, inherited, tree.value.get(inherited))
        values[name] = _convert(hints[name], node, _join(key, name))
    for name, field in fields.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise InputError(f"{tree.where}: missing key '{_join(key, name)}'")
    try:
        return cls(**values)
    except ValueError as error:
        place = tree.value.get(str(error).partition(" ")[0], tree)  # a check names its key first
        raise InputError(f"{place.where}: {key + '.' if key else ''}{error}") from None


def _convert(kind: Any, node: Located, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if node.value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        fits = [kind for kind in kinds if _is_list(kind) == isinstance(node.value, list)]
        if len(kinds) == 1 or (fits and not isinstance(node.value, (dict, type(None)))):
            return _convert((fits or kinds)[0], node, key)
        names = " or ".join(map(_name, kinds))
        raise InputError(f"{node.where}: {key} must be {names}, got {_show(node)}")
    if dataclasses.is_dataclass(kind):
        return build(kind, node, key)
    if origin is list and isinstance(node.value, list):
        return [_convert(arguments[0], item, f"{key}.{i}") for i, item in enumerate(node.value)]
    if origin is Literal and node.value in arguments:
        return node.value
    value = node.value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _number(value)  # YAML 1.1 reads 1e-4 as a string
    if kind in (bool, int, float, str) and type(value) is kind:
        if _is_sound(value):
            return value
    raise InputError(f"{node.where}: {key} must be {_name(kind)}, got {_show(node)}")


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list


def _apply(tree: Located, override: str) -> None:
    where = f"command line '{override}'"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"{where}: an override is written key=value, such as optim.lr=1e-4")
    *parents, last = path.split(".")
    for parent in parents:
        tree = _child(tree, parent, where)
    _child(tree, last, where)
    index = int(last) if isinstance(tree.value, list) else last
    tree.value[index] = _parse(text, where) or Located(None, where)


def _child(tree: Located, name: str, where: str) -> Located:
    if isinstance(tree.value, list):
        if name in map(str, range(len(tree.value))):
            return tree.value[int(name)]
        raise InputError(f"{where}: '{name}' is no index of a list of {len(tree.value)}")
    if not isinstance(tree.value, dict):
        tree.value = {}
    return tree.value.setdefault(name, Located({}, where))


def _inherit(items: Located, name: str, inherited: Located | None) -> None:
    if inherited is not None and isinstance(items.value, list):
        for item in items.value:
            if isinstance(item.value, dict):
                item.value[name] = _merge(inherited, item.value.get(name))


def _merge(base: Located, over: Located | None) -> Located:
    if over is None:
        return base
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = {name: _merge(node, over.value.get(name)) for name, node in base.value.items()}
    return Located({**over.value, **merged}, over.where)


def _parse(text: str, where: str) -> Located | None:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return _locate(node, where, iter(range(MAX_NODES))) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # a character that no YAML has comes without
        number = mark.line if mark else text.count("\n", 0, error.position)
        line = "" if where.startswith("command line") else f":{number + 1}"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise InputError(f"{where}{line}: not YAML: {problem}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def _locate(node: yaml.Node, source: str, budget: Iterator[int], key: str = "") -> Located:
    multiline = not source.startswith("command line")
    where = f"{source}:{node.start_mark.line + 1}" if multiline else source
    if next(budget, None) is None:
        raise InputError(f"{where}: more than {MAX_NODES} values")
    if isinstance(node, yaml.CollectionNode) and node.tag not in PLAIN_TAGS:
        raise InputError(f"{where}: {_named(key)} has the tag {node.tag}, which is not supported")
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return Located([_locate(x, source, budget, _join(key, str(i))) for i, x in items], where)
    if isinstance(node, yaml.MappingNode):
        pairs: dict[str, Located] = {}
        for title, value in node.value:
            name = title.value if isinstance(title, yaml.ScalarNode) else "(not a name)"
            path, line = _join(key, name), source
            if multiline:
                line = f"{source}:{title.start_mark.line + 1}"
            if name in pairs:
                raise InputError(f"{line}: key '{path}' is written twice")
            pairs[name] = Located(_locate(value, source, budget, path).value, line)
        return Located(pairs, where)
    try:
        return Located(yaml.SafeLoader("").construct_object(node), where)
    except Exception:  # PyYAML's readers of numbers and dates raise whatever comes
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise InputError(f"{where}: {_named(key)}: {node.value[:40]!r} is no {kind}") from None


def _is_sound(value: bool | int | float | str) -> bool:
    """Finite, of 64 bits, without NUL and halves of surrogate pairs, which no file name has."""
    if isinstance(value, str):
        return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value)
    return math.isfinite(value) if isinstance(value, float) else value.bit_length() < 64


def _number(value: int | str) -> float | int | str:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _named(key: str) -> str:
    return key or "the config"


def _name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    if typing.get_origin(kind) is list:
        return f"a list of {_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return names.get(kind, "mappings")


def _show(node: Located) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    if type(node.value) in kinds:
        return kinds[type(node.value)]
    if isinstance(node.value, int) and node.value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = repr(node.value)
    return text if len(text) <= 100 else f"{text[:100]}..."
