"""Zip archives from strangers (.keras, .pt2, TorchScript), looked at before anybody opens them. Called by conversion.py.

What is refused: more or larger entries than a model has, entries that unpack to much more than they are, names that lead out
of the archive, names that are there twice.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from engram_models.files import require_regular
from engram_models.importing.errors import ImportRefusedError, shown

ENTRIES_MAX = 20_000
NAME_CHARACTERS_MAX = 512
BYTES_MAX = 4 << 30  # unpacked, of all entries
_DIRECTORY_BYTES_MAX = 32 << 20
_RATIO_MAX = 200  # of an archive that unpacks to more than _SMALL_BYTES: zeros pack well, but models are not all zeros
_SMALL_BYTES = 16 << 20


def checked_names(path: Path) -> list[str]:
    """The names of an archive's entries. Raises ImportRefusedError."""
    try:
        require_regular(path)
    except OSError as error:
        raise ImportRefusedError(f"{path}: {error.strerror}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if archive.start_dir < path.stat().st_size - _DIRECTORY_BYTES_MAX:
                raise ImportRefusedError(f"{path}: its directory alone has more than {_DIRECTORY_BYTES_MAX >> 20} MB")
    except ImportRefusedError:
        raise
    except Exception as error:  # zipfile raises whatever the bytes lead it to
        raise ImportRefusedError(
            f"{path}: not a whole zip archive, as .keras, .pt2 and TorchScript files are ({error})"
        ) from None
    if len(entries) > ENTRIES_MAX:
        raise ImportRefusedError(f"{path}: {len(entries)} entries; a model has at most {ENTRIES_MAX}")
    for entry in entries:
        _check_entry(path, entry)
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ImportRefusedError(f"{path}: the entry {shown(twice)} is there twice")
    total = sum(entry.file_size for entry in entries)
    if total > BYTES_MAX:
        raise ImportRefusedError(f"{path}: unpacks to {total} bytes; at most {BYTES_MAX} are read")
    if total > _SMALL_BYTES and total > _RATIO_MAX * path.stat().st_size:
        raise ImportRefusedError(f"{path}: {path.stat().st_size} bytes unpack to {total}: that is no model")
    return names


def torch_sort(source: str, names: list[str]) -> str:
    """What torch wrote by the names of its entries: `export` or `script`. Raises ImportRefusedError where neither can be run."""
    parts = {name.partition("/")[2] for name in names}
    if "archive_format" in parts or any(
        name.endswith(("serialized_exported_program.json", "models/model.json")) for name in names
    ):
        return "export"
    if "constants.pkl" in parts and any(part.startswith("code/") for part in parts):
        return "script"
    if "data.pkl" in parts:
        raise ImportRefusedError(
            f"{source}: weights of torch.save, without the program that uses them; import the module:factory that builds the "
            "module and loads them, or save it by torch.jit.save or torch.export.save"
        )
    raise ImportRefusedError(f"{source}: neither TorchScript nor a program of torch.export.save")


def read_entry(path: Path, name: str, bytes_max: int) -> bytes:
    """One entry of an archive whose names were checked. Raises ImportRefusedError."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as entry:
            data = entry.read(bytes_max + 1)
    except Exception as error:
        raise ImportRefusedError(f"{path}: {shown(name)} cannot be read: {error}") from None
    if len(data) > bytes_max:
        raise ImportRefusedError(f"{path}: {shown(name)} has more than {bytes_max} bytes")
    return data


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    inside = not name.startswith("/") and ".." not in name.split("/") and "\\" not in name and ":" not in name
    if not inside or not name.isprintable() or len(name) > NAME_CHARACTERS_MAX:
        raise ImportRefusedError(
            f"{path}: the entry {shown(name)} leads out of the archive, or is no name of a model's part"
        )
    if entry.flag_bits & 1:
        raise ImportRefusedError(f"{path}: the entry {shown(name)} is encrypted")
