"""mixlora/config.py: strict, typed, every error at its line; and train.py's own settings."""

import dataclasses
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlora import config as configs
from mixlora.config import MAX_NODES, build, load, locate, to_yaml
from mixlora.errors import InputError
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
STORIES = (ROOT / "configs/stories260k.yaml").read_text()


@dataclass
class Inner:
    size: int = 1
    rate: float = 0.5
    name: str | None = None


@dataclass
class Entry:
    label: str
    inner: Inner = field(default_factory=Inner)


@dataclass
class Outer:
    path: str
    inner: Inner = field(default_factory=Inner)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    words: list[str] = field(default_factory=list)
    grid: list[list[int]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list, metadata={"inherits": ("inner",)})
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be >= 1, got {self.limit}")


@pytest.fixture
def parse(tmp_path: Path):
    def parse(text: str, *overrides: str, cls: type = Outer):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return load(cls, tmp_path / "c.yaml", overrides)

    parse.folder = tmp_path
    return parse


def error(parse, text: str, *overrides: str) -> str:
    """The error's text from the file's name on."""
    with pytest.raises(InputError) as caught:
        parse(text, *overrides)
    return str(caught.value).removeprefix(f"{parse.folder}/")


def test_what_is_left_out_has_its_default(parse) -> None:
    assert parse("path: x") == Outer("x")
    assert parse("path: x\ninner:\n  size: 3").inner == Inner(size=3)


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("inner: {rate: 1e-4}", "inner.rate", 1e-4),  # text to YAML 1.1
        ("inner: {rate: 1}", "inner.rate", 1.0),
        ("inner: {rate: '2.5'}", "inner.rate", 2.5),
        ("inner: {name: null}", "inner.name", None),
        ("inner: {name: ~}", "inner.name", None),
        ("limit:", "limit", None),
        ("limit: 0x10", "limit", 16),
        ("flag: yes", "flag", True),
        ("kind: b", "kind", "b"),
        ("words: []", "words", []),
        ("words: [ü, 字, '1']", "words", ["ü", "字", "1"]),
        ("grid: [[1, 2], []]", "grid", [[1, 2], []]),
        ("inner: &i {size: 4}\nentries: [{label: l, inner: *i}]", "inner.size", 4),
    ],
)
def test_values(parse, line: str, key: str, value: object) -> None:
    config = parse(f"path: x\n{line}")
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("pth: y", "c.yaml:2: unknown key 'pth' (did you mean 'path'?)"),
        ("zzz: y", "c.yaml:2: unknown key 'zzz' (known: entries, flag, grid, inner, kind, limit,"),
        ("inner: {size: 1,\n  sise: 2}", "c.yaml:3: unknown key 'inner.sise' (did you mean 'size'"),
        ("inner: {size: 1.0}", "c.yaml:2: inner.size must be a whole number, got 1.0"),
        ("inner: {size: true}", "c.yaml:2: inner.size must be a whole number, got True"),
        ("inner: {size: null}", "c.yaml:2: inner.size must be a whole number, got nothing"),
        ("inner: {size: 1_0.0e}", "c.yaml:2: inner.size must be a whole number, got '1_0.0e'"),
        ("inner: {rate: true}", "c.yaml:2: inner.rate must be a finite number, got True"),
        ("inner: {rate: [1]}", "c.yaml:2: inner.rate must be a finite number, got a list"),
        ("inner: {rate: .nan}", "c.yaml:2: inner.rate must be a finite number, got nan"),
        ("inner: {rate: -.inf}", "c.yaml:2: inner.rate must be a finite number, got -inf"),
        ("inner: {rate: 1e400}", "c.yaml:2: inner.rate must be a finite number, got '1e400'"),
        ("inner: {rate: nan}", "c.yaml:2: inner.rate must be a finite number, got 'nan'"),
        ("inner: 3", "c.yaml:2: inner must be a mapping, got 3"),
        ("inner:", "c.yaml:2: inner must be a mapping, got nothing"),
        ("kind: c", "c.yaml:2: kind must be a or b, got 'c'"),
        ("kind: [a]", "c.yaml:2: kind must be a or b, got a list"),
        ("flag: 1", "c.yaml:2: flag must be true or false, got 1"),
        ("flag: 'true'", "c.yaml:2: flag must be true or false, got 'true'"),
        ("words: [a,\n  2]", "c.yaml:3: words.1 must be text, got 2"),
        ("words: {a: 1}", "c.yaml:2: words must be a list of text, got a mapping"),
        ("grid: [[1], 2]", "c.yaml:2: grid.1 must be a list of a whole number, got 2"),
        ("limit: 0", "c.yaml:2: limit must be >= 1, got 0"),
        ("limit: 2020-01-01", "c.yaml:2: limit must be a whole number, got datetime.date"),
        ("path: y", "c.yaml:2: key 'path' is written twice"),
        ("? [a]\n: 1", "c.yaml:2: unknown key '(not a name)'"),
        ("<<: {flag: true}", "c.yaml:2: unknown key '<<'"),
        ("words: !!python/name:os.system x", "c.yaml:2: words: 'x' is no python/name:os.system"),
        ("words: !!python/tuple [a]", "c.yaml:2: words has the tag tag:yaml.org,2002:python/tu"),
        ("inner: !!set {size}", "c.yaml:2: inner has the tag tag:yaml.org,2002:set, which is"),
        ("words: [a,\n  !x {}]", "c.yaml:3: words.1 has the tag !x, which is not supported"),
        ("inner: {size: 1,\n  size: 2}", "c.yaml:3: key 'inner.size' is written twice"),
        ("limit: !!int x", "c.yaml:2: limit: 'x' is no int"),
        ("limit: !!int ''", "c.yaml:2: limit: '' is no int"),
        ("flag: !!bool maybe", "c.yaml:2: flag: 'maybe' is no bool"),
        ("path2: 2020-13-01", "c.yaml:2: path2: '2020-13-01' is no timestamp"),
        ("words: [*none]", "c.yaml:2: not YAML: found undefined alias"),
        ("words: [a\nflag: true", "c.yaml:3: not YAML"),
        ('words: ["\\ud800"]', "c.yaml:2: words.0 must be text, got '\\ud800'"),
        ('words: ["\\0"]', "c.yaml:2: words.0 must be text, got '\\x00'"),
        (f"limit: {1 << 63}", "c.yaml:2: limit must be a whole number, got 9223372036854775808"),
        (f"limit: 0x{'f' * 5000}", "c.yaml:2: limit must be a whole number, got a number of more"),
        (f"limit: {'9' * 5000}", "c.yaml:2: limit: '999999999999999999999999999999999999"),
        (f"limit: {'x' * 5000}", f"c.yaml:2: limit must be a whole number, got '{'x' * 99}..."),
    ],
)
def test_a_wrong_line(parse, line: str, message: str) -> None:
    assert error(parse, f"path: x\n{line}\n").startswith(message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "c.yaml: missing key 'path'"),
        ("# nothing", "c.yaml: missing key 'path'"),
        ("flag: true", "c.yaml:1: missing key 'path'"),
        ("- path: x", "c.yaml:1: the config must be a mapping, got a list"),
        ("path", "c.yaml:1: the config must be a mapping, got 'path'"),
        ("path: x\n---\npath: y", "c.yaml:2: not YAML: but found another document"),
        ("path: x\nentries:\n  - inner: {}", "c.yaml:3: missing key 'entries.0.label'"),
        ("path: x\x00", "c.yaml:1: not YAML: unacceptable character #x0000"),
        ("path: |\n  x\n  \x00", "c.yaml:3: not YAML: unacceptable character #x0000"),
        ("!!int x", "c.yaml:1: the config: 'x' is no int"),
        ("path: " + "[" * 600, "c.yaml: nested too deeply"),
        ("path: &a [*a]", "c.yaml: nested too deeply"),
    ],
)
def test_a_wrong_file(parse, text: str, message: str) -> None:
    assert error(parse, text).startswith(message)


def test_a_bomb_of_aliases_is_defused(parse) -> None:
    """Twelve lines that stand for 10^12 values."""
    lines = ["path: x", "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert f"more than {MAX_NODES} values" in error(parse, "\n".join(lines))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"path: \xff")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "c.yaml"):
        with pytest.raises(InputError, match=f"^config {re.escape(str(path))}: cannot be read"):
            load(Outer, path)


def test_overrides_win_in_their_order(parse) -> None:
    text = "path: x\ninner: {size: 3}\nwords: [a, b]\nentries: [{label: l}]\n"
    config = parse(
        text, "inner.rate=1e-4", "inner.size=4", "inner.size=5", "words.1=c", "entries.0.label=m"
    )
    assert config.inner == Inner(5, 1e-4) and config.words == ["a", "c"]
    assert config.entries == [Entry("m", Inner(5, 1e-4))]
    assert parse(text, "words=[d]", "limit=null", "kind=b").words == ["d"]
    assert parse(text, "path=a=b").path == "a=b"
    assert parse("flag: true", "path=y") == Outer("y", flag=True)
    assert parse("", "path=y", "inner.size=2") == Outer("y", Inner(2))


@pytest.mark.parametrize(
    "override, message",
    [
        ("path", "command line 'path': an override is written key=value"),
        ("=x", "command line '=x': an override is written key=value"),
        ("inner.sise=1", "command line 'inner.sise=1': unknown key 'inner.sise' (did you mean"),
        ("iner.size=1", "command line 'iner.size=1': unknown key 'iner' (did you mean 'inner'?)"),
        ("inner.size=x", "command line 'inner.size=x': inner.size must be a whole number, got 'x'"),
        ("inner.size=", "command line 'inner.size=': inner.size must be a whole number, got noth"),
        ("words.2=c", "command line 'words.2=c': '2' is no index of a list of 2"),
        ("words.-1=c", "command line 'words.-1=c': '-1' is no index of a list of 2"),
        ("words.01=c", "command line 'words.01=c': '01' is no index of a list of 2"),
        ("words.²=c", "command line 'words.²=c': '²' is no index of a list of 2"),
        ("words=[c", "command line 'words=[c': not YAML"),
        ("limit=0", "command line 'limit=0': limit must be >= 1, got 0"),
        ("inner..size=1", "unknown key 'inner.'"),
    ],
)  # fmt: skip
def test_a_wrong_override(parse, override: str, message: str) -> None:
    assert message in error(parse, "path: x\nwords: [a, b]\n", override)


def test_an_alias_is_a_copy(parse) -> None:
    """An override of one place leaves the other as it was."""
    text = "path: x\ninner: &i {size: 4}\nentries: [{label: l, inner: *i}]"
    config = parse(text, "inner.size=5")
    assert (config.inner.size, config.entries[0].inner.size) == (5, 4)


def test_an_entry_inherits_what_it_leaves_out(parse) -> None:
    text = """\
model: {base: m}
run: {dir: d}
train: {steps: 5, batch_size: 3}
adapter: {r: 4, top_k: 1, num_experts: 2, routing_strategy: mixlora}
optim: {lr: 1e-3, warmup_steps: 2}
data: {tasks: [boolq]}
adapters:
  - name: first
  - name: second
    adapter: {r: 8}
    optim: {lr: 5e-4}
    train: {steps: null, epochs: 2}
    data: {tasks: [piqa]}
"""
    config = parse(text, cls=TrainConfig)
    first, second = config.runs()
    assert (first.adapter, first.optim) == (config.adapter, config.optim)
    assert (first.train, first.data) == (config.train, config.data)
    assert (second.adapter.r, second.adapter.num_experts, second.adapter.top_k) == (8, 2, 1)
    assert (second.optim.lr, second.optim.warmup_steps) == (5e-4, 2)
    assert (second.train.steps, second.train.epochs, second.train.batch_size) == (None, 2, 3)
    assert second.data.tasks == ["piqa"] and config.data.tasks == ["boolq"]

    changed = parse(text, "optim.warmup_steps=7", "adapters.1.adapter.r=16", cls=TrainConfig)
    assert [run.optim.warmup_steps for run in changed.runs()] == [7, 7]
    assert [run.adapter.r for run in changed.runs()] == [4, 16]


def test_an_error_in_an_entry_names_the_entry(parse) -> None:
    text = "path: x\nentries:\n  - label: l\n  - label: m\n    inner:\n      sise: 1\n"
    assert error(parse, text).startswith("c.yaml:6: unknown key 'entries.1.inner.sise' (did you")
    assert error(parse, "path: x\ninner: {size: a}\nentries: [{label: l}]").startswith("c.yaml:2")
    assert error(parse, "path: x\nentries: 3").startswith("c.yaml:2: entries must be a list of")
    assert error(parse, "path: x\nentries: [3]").startswith("c.yaml:2: entries.0 must be a map")


def test_without_a_list_there_is_one_adapter() -> None:
    config = load(TrainConfig, ROOT / "configs/stories260k.yaml")
    (run,) = config.runs()
    assert run.name == "default" and run.adapter is config.adapter and run.train is config.train


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_repository_loads_and_round_trips(path: Path, parse) -> None:
    config = load(TrainConfig, path)
    assert parse(to_yaml(config), cls=TrainConfig) == config


@given(
    st.builds(
        Outer,
        path=st.text(),
        inner=st.builds(
            Inner,
            size=st.integers(-(1 << 63) + 1, (1 << 63) - 1),
            rate=st.floats(allow_nan=False, allow_infinity=False),
            name=st.none() | st.text(),
        ),
        kind=st.sampled_from("ab"),
        flag=st.booleans(),
        words=st.lists(st.text(max_size=8), max_size=4),
        grid=st.lists(st.lists(st.integers(-9, 9), max_size=3), max_size=3),
        limit=st.none() | st.integers(1, 9),
    )
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_is_written_is_read_back(config: Outer) -> None:
    tree = configs._parse(to_yaml(config), "written")
    if "\0" in "".join([config.path, config.inner.name or "", *config.words]):
        with pytest.raises(InputError, match="must be text"):
            build(Outer, tree)
    else:
        assert build(Outer, tree) == config


def test_values_of_json_go_through_the_same_checks() -> None:
    assert build(Outer, locate({"path": "x", "inner": {"rate": 2}}, "a.json")) == Outer(
        "x", Inner(rate=2.0)
    )
    with pytest.raises(InputError, match=r"^a\.json: inner\.size must be a whole number, got 1\.5"):
        build(Outer, locate({"path": "x", "inner": {"size": 1.5}}, "a.json"))


STRANGE = r"""
.nan | 1e400 | -1 | 0 | 99999999999999999999 | 1:30 | ~ | '' | 2020-99-99 | 2020-01-01 | # | [[[]]]
!!python/object:os.system x | !!python/object/apply:os.system [ls] | !!set {a} | !!str | !!binary x
!!binary //// | !!int x | !!float '' | !!bool 3 | !!timestamp x | !!null 1 | !!int 1 | <<: {a: 1}
&a [*a] | *b | &b {c: *b} | {? [a] : b} | {? {} : b} | {} | - a | ? | : | %TAG | --- | ... | << | =
字: 字 | "\U0001f600": 1 | "\0" | "\ud800" | >
"""
STRANGE = STRANGE.strip().replace("\n", " | ").split(" | ")
STRANGE += ["[" * 600, "9" * 5000, "0x" + "f" * 5000, *"\t\0\x85\u2028\ufeff\ud800"]


def mutate(text: str, rng: random.Random) -> str:
    """One or two changes: a strange value or line, lost or doubled or swapped pieces."""
    for _ in range(rng.randint(1, 2)):
        lines = text.split("\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        place = rng.randrange(len(text) + 1)
        match max(0, rng.randrange(-4, 7)):
            case 0:
                lines[i] = lines[i].partition(":")[0] + ": " + rng.choice(STRANGE)
            case 1:
                indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
                lines.insert(i, indent + rng.choice(STRANGE))
            case 2:
                lines[i], lines[j] = lines[j], lines[i]
            case 3:
                lines.insert(j, lines[i])
            case 4:
                lines[i] = " " * rng.randrange(5) + lines[i].lstrip()
            case 5:
                lines = [text[:place] + rng.choice(STRANGE) + text[place:]]
            case 6:
                lines = [text[:place] + text[place + rng.randrange(9) :]]
        text = "\n".join(lines)
    return text


def keys_of(config: object) -> list[str]:
    """All that a config's file may set."""
    if not dataclasses.is_dataclass(config):
        return []
    parts = ((part.name, getattr(config, part.name)) for part in dataclasses.fields(config))
    return [y for name, part in parts for y in (name, *(f"{name}.{x}" for x in keys_of(part)))]


KEYS = "|".join(map(re.escape, keys_of(load(TrainConfig, ROOT / "configs/stories260k.yaml"))))
PLACED = re.compile(
    r"c\.yaml: (nested too deeply|missing key '\w+')|"
    rf"c\.yaml:\d+: (not YAML: .|(unknown |missing )?key '.|({KEYS}|the config)(\.\d+)*:? "
    r"|.+ has the tag .|.+: '.*' is no .)",
    re.DOTALL,
)


@given(st.integers(0, 1 << 32))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_300_mutations_give_a_config_or_an_input_error(seed: int) -> None:
    text = mutate(STORIES, random.Random(seed))
    try:
        tree = configs._parse(text, "c.yaml") or locate({}, "c.yaml")
        config = build(TrainConfig, tree)
    except InputError as error:
        assert PLACED.match(str(error)), error
    else:
        written = to_yaml(config)
        assert build(TrainConfig, configs._parse(written, "written")) == config
        written.encode()
