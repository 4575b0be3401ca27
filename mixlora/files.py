"""Files: safetensors and JSON read with every fault named, written whole or not at all.

Tensors are memory-mapped: one is read when it is asked for. A pickled file (.bin) is read by
torch's reader of tensors alone, which runs no code of the file.
"""

import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from mixlora.errors import InputError

Shape = tuple[int, ...]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_NAMES = 200  # of one kind that an error lists


class TensorFile:
    """One safetensors file: `shapes` and `dtypes` by tensor name, `metadata`, `file[name]` for a
    tensor. Of dtypes, those that are no floating-point numbers of torch are text."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            self._file = safetensors.safe_open(self.path, "pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            self.shapes: dict[str, Shape] = {x: tuple(y.get_shape()) for x, y in slices.items()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            self.dtypes = {name: FLOATS.get(kind, kind) for name, kind in kinds.items()}
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole safetensors file: {error}") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class PickledTensorFile:
    """A .bin file of torch.save: a dictionary of tensors and nothing else."""

    SAFE_TORCH = (2, 10)  # earlier ones ran code in spite of weights_only (CVE-2026-24747)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if tuple(map(int, torch.__version__.split(".")[:2])) < self.SAFE_TORCH:
            raise InputError(f"{path}: a .bin file is read by torch 2.10 or newer only")
        try:
            tensors = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's reader raises whatever a damaged file makes it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: not a file of tensors: {reason}") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(key, str) and isinstance(x, Tensor) for key, x in tensors.items()
        ):
            raise InputError(f"{path}: must hold a dictionary of tensors by name")
        self._tensors: dict[str, Tensor] = tensors
        self.shapes: dict[str, Shape] = {key: tuple(x.shape) for key, x in tensors.items()}
        self.dtypes = {key: x.dtype for key, x in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def check_floats(file: TensorFile | PickledTensorFile, names: Collection[str]) -> None:
    """Whole numbers would be cast without a word: they are another program's quantised weights."""
    for name in names:
        if file.dtypes[name] not in FLOATS.values():
            got = str(file.dtypes[name]).removeprefix("torch.")
            raise InputError(f"{file.path}: {name} must be float16, 32, 64 or bfloat16, got {got}")


def check_shapes(
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    source: str | Path,
    likely_cause: Callable[[list[str], list[str], list[str]], str] = lambda *_: "",
) -> None:
    """One error that lists every missing, unexpected and misshaped tensor, or none.

    `likely_cause(missing, unexpected, misshaped)` may add a sentence.
    """
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    both = sorted(wanted.keys() & found.keys())
    misshaped = [name for name in both if tuple(found[name]) != tuple(wanted[name])]
    if not (missing or unexpected or misshaped):
        return
    parts = []
    if missing:
        parts.append(f"missing: {_listed(missing)}")
    if unexpected:
        parts.append(f"unexpected: {_listed(unexpected)}")
    if misshaped:
        shapes = [
            f"{name} must be {list(wanted[name])}, got {list(found[name])}" for name in misshaped
        ]
        parts.append(f"misshaped: {_listed(shapes)}")
    cause = likely_cause(missing, unexpected, misshaped)
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(misshaped)} misshaped"
    raise InputError(f"{source}: {counts} tensors; {'; '.join(parts)}{cause and '; ' + cause}")


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_bytes(path, to_bytes(contiguous, metadata={"format": "pt", **(metadata or {})}))


def write_pickled_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    content = io.BytesIO()
    torch.save(
        {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, content
    )
    write_bytes(path, content.getvalue())


def write_json(path: str | Path, value: object) -> None:
    write_bytes(path, to_json(value))


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_bytes(path: str | Path, content: bytes) -> None:
    """The file appears whole or not at all, also after a crash: temporary file, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(content)
            while rest:  # a write may take less than it is given
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def make_folder(path: str | Path) -> None:
    """A folder and its parents, which are there after a crash, too."""
    path = Path(path)
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; anything else is an error that names the file and the line."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a number of 5000 digits
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_text(path: str | Path) -> str:
    """UTF-8 with or without a byte order mark; line ends stay what they are."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of JSON lines or of a JSON array; blank lines are skipped."""
    text = read_text(path)
    is_array = text.lstrip().startswith("[")
    for line, row in _array(text, path) if is_array else _lines(text, path):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise InputError(f"{path}:{line}: a row must be a JSON object, got {kind}")
        yield f"{path}:{line}", row


def _lines(text: str, path: str | Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse(line, path, number)


def _array(text: str, path: str | Path) -> Iterator[tuple[int, object]]:
    """The array is parsed twice: as a whole for its faults, then item by item for their lines."""
    num_items, decoder = len(_parse(text, path, 1)), json.JSONDecoder()
    line, counted, at = 1, 0, text.index("[") + 1
    for _ in range(num_items):
        while text[at] in " \t\r\n,":
            at += 1
        line += text.count("\n", counted, at)
        counted = at
        item, at = decoder.raw_decode(text, at)
        yield line, item


def _parse(text: str, path: str | Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits
        raise InputError(f"{path}:{line}: not JSON: {error}") from None
