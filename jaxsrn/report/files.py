"""The named arrays of files: `.safetensors` in one file or several, `.npz`, and Orbax checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxsrn._tools.checks import ensure
from jaxsrn.operators.layers import plain
from jaxsrn.report.named_arrays import ArrayInfo, NamedArrays, names_of, natural, sorted_infos

__all__ = ["BrokenFile", "MissingExtra", "open_arrays"]

_INDEX = ".safetensors.index.json"
_FORMATS = f"a .safetensors file, an index *{_INDEX} or its folder, an .npz file, or the folder of an Orbax checkpoint"


class BrokenFile(ValueError):
    """A file that exists and cannot be read as what its name says."""


class MissingExtra(ImportError):
    """A library that a file format needs is not installed."""


def open_arrays(path: str | os.PathLike) -> NamedArrays:
    """The arrays of a file or folder.

    Raises:
      FileNotFoundError: there is none at this path.
      BrokenFile: it is not what its name says.
      ValueError: a format that is none of these.
      MissingExtra: the library that reads the format is not installed; the message says what to install.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; expected {_FORMATS}.")
    if path.is_dir():
        indices = sorted(path.glob(f"*{_INDEX}"))
        ensure(len(indices) < 2, f"{path}: it has {len(indices)} indices, expected one; name the one that is meant.")
        return _Shards(indices[0]) if indices else _Orbax(path)
    if path.name.endswith(_INDEX):
        return _Shards(path)
    kinds = {".safetensors": _Safetensors, ".npz": _Npz}
    ensure(path.suffix in kinds, f"{path}: got a file named *{path.suffix}, expected {_FORMATS}.")
    return kinds[path.suffix](path)


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the body is done.

    Raises:
      BrokenFile: `path` is a folder.
    """
    if path.is_dir():
        raise BrokenFile(f"{path}: cannot be written, as it is a folder.")
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        # Temporary files are readable by their owner alone; the result is as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


class _Safetensors(NamedArrays):
    """A `.safetensors` file. The library checks it; arrays are read from where its header says that they are.

    The library maps the file into memory, where a page that was read counts as memory while the file is open, and reads
    the whole header whenever it opens it.
    """

    _DTYPES: Mapping[str, str] = {
        "BF16": "bfloat16",
        "F16": "float16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "BOOL": "bool",
        **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
        **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    }

    def __init__(self, path: Path):
        self._path, self.source = path, path.name
        self._check()
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.infos = sorted_infos(
            {name: ArrayInfo(tuple(entry["shape"]), self._dtype(entry["dtype"])) for name, entry in header.items()}
        )
        self._offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def _check(self) -> None:
        """Raises `BrokenFile` where the library refuses the file."""
        try:
            import safetensors
        except ImportError as error:
            raise MissingExtra(
                f"{self._path}: reading .safetensors needs safetensors; install it: pip install safetensors."
            ) from error
        try:
            with safetensors.safe_open(self._path, framework="numpy"):
                pass
        except safetensors.SafetensorError as error:
            raise BrokenFile(f"{self._path}: cannot be read as a .safetensors file ({error}).") from error

    def _dtype(self, name: str) -> np.dtype | str:
        return np.dtype(self._DTYPES[name]) if name in self._DTYPES else name

    def read(self, name):
        shape, dtype = self.infos[name]
        stored = np.dtype(dtype).newbyteorder("<")
        array = np.fromfile(self._path, stored, math.prod(shape), offset=self._offsets[name])
        return array.reshape(shape).astype(dtype, copy=False)

    def copy(self, path, change):
        # Only the bytes of changed arrays are written over those of a copy, so that all else is the same, arrays of
        # types that NumPy does not know and the metadata included.
        with _complete(path) as copied:
            shutil.copyfile(self._path, copied)
            with open(copied, "r+b") as file:
                for name in self.infos:
                    array = change(name)
                    if array is not None:
                        file.seek(self._offsets[name])
                        file.write(_bytes(array, self.infos[name]))


class _Shards(NamedArrays):
    """Several `.safetensors` files and the index that says which of them holds which array (Hugging Face's layout)."""

    def __init__(self, index: Path):
        self._index, self.source = index, index.name
        try:
            places = json.loads(index.read_text())["weight_map"]
            outside = [place for place in places.values() if not place or Path(place).name != place]
            if outside:
                raise BrokenFile(f"{index}: it names {outside[0]!r}, expected the names of files beside it.")
            paths = {place: index.parent / place for place in sorted(set(places.values()))}
            missing = [path for path in paths.values() if not path.exists()]
            if missing:
                raise BrokenFile(f"{missing[0]}: there is no such file, which an index names.")
            files = {place: _Safetensors(path) for place, path in paths.items()}
            self.infos = sorted_infos({name: files[place].infos[name] for name, place in places.items()})
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
            raise BrokenFile(f"{index}: no index of .safetensors files ({error!r}).") from error
        self._files = files
        self._file_of = {name: files[place] for name, place in places.items()}

    def read(self, name):
        return self._file_of[name].read(name)

    def copy(self, path, change):
        index = path if path.name.endswith(_INDEX) else path / self._index.name
        ensure(
            index.parent.resolve() != self._index.parent.resolve(),
            f"{path}: it is in the folder that is read, expected another one, as the files keep their names.",
        )
        index.parent.mkdir(parents=True, exist_ok=True)
        for place, file in self._files.items():
            file.copy(index.parent / place, change)
        # The index comes last, so that what an interrupted run leaves is no set of files.
        with _complete(index) as copied:
            shutil.copyfile(self._index, copied)


def _bytes(array: np.ndarray, info: ArrayInfo) -> bytes:
    ensure(
        (array.shape, array.dtype) == tuple(info),
        f"array: got {array.dtype}{array.shape} in the place of {info.dtype}{info.shape}, expected the same.",
    )
    return np.ascontiguousarray(array).tobytes()


# What a damaged `.npz` file raises.
_DAMAGES = zipfile.BadZipFile, zlib.error, ValueError, EOFError


class _Npz(NamedArrays):
    """An `.npz` file. Two-byte records without a type, which is what NumPy makes of bfloat16, are read as bfloat16."""

    def __init__(self, path: Path):
        self._path, self.source = path, path.name
        try:
            # It stays open, as opening it reads the whole list of its members.
            self._archive = zipfile.ZipFile(path)
            self._members = {_key(name): name for name in self._archive.namelist()}
            self.infos = {key: self._header(self._archive, name) for key, name in self._members.items()}
        except (*_DAMAGES, OSError) as error:
            raise BrokenFile(f"{path}: cannot be read as an .npz file ({error}).") from error

    @staticmethod
    def _header(archive: zipfile.ZipFile, name: str) -> ArrayInfo:
        with archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(member)
        return ArrayInfo(shape, np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype)

    def read(self, name):
        try:
            with self._archive.open(self._members[name]) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
        except _DAMAGES as error:
            raise BrokenFile(f"{self._path}: {name} cannot be read ({error}).") from error
        # JAX takes numbers in the byte order of the machine alone.
        array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array

    def copy(self, path, change):
        with _complete(path) as copied, zipfile.ZipFile(copied, "w") as new:
            for member in self._archive.infolist():
                array = change(_key(member.filename))
                place = zipfile.ZipInfo(member.filename, member.date_time)
                place.compress_type = member.compress_type
                with new.open(place, "w", force_zip64=True) as target:
                    if array is None:
                        with self._archive.open(member) as source:
                            shutil.copyfileobj(source, target)
                    else:
                        # A bfloat16 array is written as the record without a type that it was read from.
                        raw = array.view("V2") if array.dtype == ml_dtypes.bfloat16 else array
                        np.lib.format.write_array(target, raw, allow_pickle=False)


def _key(member: str) -> str:
    return member.removesuffix(".npy")


class _Orbax(NamedArrays):
    """The folder of an Orbax checkpoint, or of one of its items, such as `step/params`."""

    def __init__(self, path: Path):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise MissingExtra(
                f"{path}: reading a checkpoint folder needs Orbax; install it: pip install orbax-checkpoint."
            ) from error
        self._ocp, self._path, self.source = ocp, self._item(path).absolute(), path.name
        try:
            # The handler itself, as a checkpointer also looks for what only the whole step has, and warns.
            self._tree = ocp.PyTreeCheckpointHandler().metadata(self._path).tree
        except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
            raise BrokenFile(f"{path}: no Orbax checkpoint that can be read ({error}).") from error
        leaves = jax.tree_util.tree_leaves_with_path(self._tree)
        names = names_of([plain(key) for key, _ in leaves])
        self._paths = {name: key for name, (key, _) in zip(names, leaves, strict=True)}
        self.infos = sorted_infos(
            {name: _info_of_metadata(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
        )

    @staticmethod
    def _item(path: Path) -> Path:
        """The folder of the one tree of arrays that is at `path` or below it."""
        if (path / "_METADATA").exists():
            return path
        found = sorted({meta.parent for meta in path.glob("*/_METADATA")} or
                       {meta.parent for meta in path.glob("*/*/_METADATA")}, key=lambda p: natural(str(p)))  # fmt: skip
        if not found:
            raise BrokenFile(f"{path}: a folder without an Orbax checkpoint; expected {_FORMATS}.")
        ensure(
            len(found) == 1, f"{path}: it has several checkpoints, expected one; choose {', '.join(map(str, found))}."
        )
        return found[0]

    def _restored(self, wanted: Callable[[tuple], bool]) -> Any:
        ocp = self._ocp
        item = jax.tree_util.tree_map_with_path(lambda key, _: 0 if wanted(key) else ocp.PLACEHOLDER, self._tree)
        # Numbers and strings of Python come back as they are.
        as_is = ocp.metadata.value.ScalarMetadata, ocp.metadata.value.StringMetadata
        args = jax.tree.map(
            lambda leaf: ocp.RestoreArgs(restore_type=None if isinstance(leaf, as_is) else np.ndarray), self._tree
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(self._path, args=ocp.args.PyTreeRestore(item=item, restore_args=args))

    def read(self, name):
        path = self._paths[name]
        restored = self._restored(lambda key: key == path)
        found = {plain(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(restored)}
        return np.asarray(found[plain(path)])

    def copy(self, path, change):
        # Orbax writes whole trees, so this format alone is held in memory at once.
        ensure(not path.exists(), f"{path}: it exists, expected a new folder for the checkpoint.")

        name_of = {path: name for name, path in self._paths.items()}

        def changed(key, leaf):
            new = change(name_of[key])
            return leaf if new is None else new

        tree = jax.tree_util.tree_map_with_path(changed, self._restored(lambda key: True))
        with self._ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)


def _info_of_metadata(leaf) -> ArrayInfo:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return ArrayInfo((), type(leaf).__name__)
    return ArrayInfo(tuple(leaf.shape or ()), np.dtype(dtype))
