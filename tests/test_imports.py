"""Imports point downward, as the table says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the files of a folder may import of this project; the longest entry that fits a file holds.
MAY_IMPORT = {
    "mixlora/errors.py": [],
    "mixlora/config.py": ["mixlora.errors"],
    "mixlora/files.py": ["mixlora.errors"],
    "mixlora/memory.py": ["mixlora.errors", "mixlora.files"],
    "mixlora/ops/": ["mixlora._C", "mixlora.ops", "mixlora.errors"],
    "mixlora/layers/": [f"mixlora.{name}" for name in ("ops", "layers", "config", "errors")],
    "mixlora/": ["mixlora"],
    "models/": ["models"]
    + [f"mixlora.{name}" for name in ("ops", "layers", "config", "files", "memory", "errors")],
}
SCRIPTS = [path.stem for path in ROOT.glob("*.py")]


def is_in(name: str, packages: list[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import, wherever it stands; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    allowed = MAY_IMPORT[max(filter(path.startswith, MAY_IMPORT), key=len)]
    return [
        f"{path}:{line} imports {name}, may import {', '.join(allowed) or 'nothing'} of ours"
        for line, name in imports(path, source)
        if is_in(name, ["mixlora", "models", *SCRIPTS]) and not is_in(name, allowed)
    ]


def test_imports_point_downward() -> None:
    files = [path for folder in ("mixlora", "models") for path in (ROOT / folder).rglob("*.py")]
    assert files
    found = [
        line
        for path in sorted(files)
        for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "path, source, name",
    [
        ("mixlora/ops/foo.py", "from mixlora.layers import lora", "mixlora.layers.lora"),
        ("mixlora/ops/foo.py", "from ..layers import lora", "mixlora.layers.lora"),
        ("mixlora/layers/foo.py", "def f():\n    import models.llama", "models.llama"),
        ("mixlora/data.py", "import models", "models"),
        ("models/foo.py", "from mixlora.data import pack", "mixlora.data.pack"),
        ("models/foo.py", "import setup", "setup"),
        ("mixlora/errors.py", "from mixlora import config", "mixlora.config"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str, name: str) -> None:
    (line,) = violations(path, source)
    assert line.startswith(f"{path}:{source.count(chr(10)) + 1} imports {name}, may import ")
