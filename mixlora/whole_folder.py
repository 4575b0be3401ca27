"""Folders that are there whole or not at all, also after a crash, and that can tell.

    publish    temporary folder, every file and the folder fsynced, MANIFEST.json (bytes and sha256
               of every file) written last, rename, fsync of the parent, a look at what is there
    verify     every file is there and is, to the bit, what the manifest says
    discard    rename into a temporary folder, fsync of the parent, then deletion

What a crash leaves behind is a temporary folder (`.<name>.<pid>.tmp`), which `sweep` deletes. That
nobody else writes beside these functions, a lock sees to (run_folder.py).
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from mixlora.errors import InputError
from mixlora.files import fsync_folder, make_folder, read_json, to_json, write_bytes

MANIFEST = "MANIFEST.json"
FORMAT = 1  # of the manifest and of the files it lists


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """`folder`, which must not exist, with the files that `write` leaves in the one it is given."""
    make_folder(folder.parent)
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        write(temporary)
        names = sorted(path.name for path in temporary.iterdir())
        files = {name: _described(temporary / name) for name in names}
        write_bytes(temporary / MANIFEST, to_json({"format": FORMAT, "files": files}))
        fsync_folder(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    verify(folder, names, contents=False)


def verify(folder: Path, names: Collection[str], contents: bool = True) -> None:
    """An error unless the folder holds these files and they are what its manifest says; without
    `contents`, as far as their sizes tell. Opens no other file."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: format must be {FORMAT}, got {manifest.get('format')!r}")
    files = manifest.get("files")
    listed = files if isinstance(files, dict) else {}
    if manifest.keys() != {"format", "files"} or listed.keys() != set(names):
        wanted, got = ", ".join(sorted(names)), ", ".join(sorted(listed)) or "none"
        raise InputError(f"{path}: must list the files {wanted}, got {got[:500]}")
    if path.read_bytes() != to_json(manifest):  # a bit that JSON does not mind
        raise InputError(f"{path}: is not as it was written")
    for name, described in listed.items():
        wanted = described.get("bytes") if isinstance(described, dict) else None
        try:
            status = os.lstat(folder / name)
        except FileNotFoundError:
            raise InputError(f"{folder / name}: no such file") from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != wanted:
            raise InputError(
                f"{folder / name}: must be a file of {wanted!r} bytes as {MANIFEST} says, got "
                f"{status.st_size}"
            )
    for name, described in listed.items() if contents else ():
        if _described(folder / name) != described:
            raise InputError(f"{folder / name}: is not what was written: its sha256 differs")


def discard(folder: Path) -> None:
    """At no moment does a part of it stand under its name."""
    temporary = _temporary(folder)
    folder.rename(temporary)
    fsync_folder(folder.parent)
    shutil.rmtree(temporary)


def sweep(parent: Path) -> None:
    """Delete what publish and discard of earlier processes left, as far as it can be deleted."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.tmp")


def _described(path: Path) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
