"""Files of `torch.save`, and pickles of arrays, read as data: nothing they name is imported, and nothing is called.

A pickle is a program for a small stack machine. The machine here knows plain values, containers and tensors. Every
other object (argparse.Namespace, a numpy scalar, a configuration) becomes an `Unknown`, a dict with a name.
Both formats of torch are read: zip files, and the single stream from before torch 1.6. A plain pickle (detectron2's
`.pkl`) is read if numpy arrays or torch's tensors are in it; arrays become tensors.
"""

from __future__ import annotations

import io
import itertools
import math
import operator
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError, in_one_line, pass_on

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80"
"""The first bytes of the two formats; a pickle starts the second one."""
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of torch, in front of the second one

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_RUNS_CODE = frozenset(
    "os posix nt sys subprocess commands runpy importlib imp pickle _pickle cPickle dill cloudpickle joblib "  # noqa: SIM905
    "marshal "
    "shelve code codeop pty ctypes socket shutil webbrowser timeit pdb bdb pip urllib requests".split()
)
_RUNS_CODE_BUILTINS = frozenset(["eval", "exec", "execfile", "compile", "__import__", "open", "input", "breakpoint"])
_KEYS = (str, int, float, bytes, type(None))  # hashing a deep tuple would overflow C's stack
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "  # noqa: SIM905
    "BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_PARAMETERS = (
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_HARMLESS = ("_codecs.encode", "torch.Size", "torch.device", "builtins.set", "builtins.complex", "builtins.bytearray")
"""Values that torch itself reads; beside the weights nobody misses them."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMPY = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}
_NEW_ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_ARRAY_OF_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
"""How numpy pickles an array: an empty one with a state, and from protocol 5 on a buffer with a shape."""
_NESTED = "torch.storage._load_from_bytes"
"""How a tensor lies in a plain pickle: its storage is a file of torch of its own."""
_MAX_DIMS = 64  # of torch itself
_DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RecursionError,
           RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile)  # fmt: skip
"""What a damaged file makes pickletools, zipfile or the machine raise."""


class Unknown(dict[Any, Any]):
    """An object of a class that is not looked up, with the items that the file puts into it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in the file; `load` reads it. `size` and `stride` count elements."""

    load_storage: Callable[[torch.dtype], Tensor] = field(repr=False)
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """The tensor, in memory of its own storage."""
        return self.load_storage(self.dtype).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class TorchFile:
    """What a file holds: dicts, lists, plain values, `StoredTensor`s, and `Unknown`s of the classes in `unknown`."""

    content: object
    unknown: tuple[str, ...]


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Read the structure of a file; its tensors can be loaded as long as the context lasts.

    Raises CheckpointError for damage, and for files that name functions made to run code.
    """
    try:
        with path.open("rb") as file:
            machine = _Machine()
            content = _read_zip(file, machine) if file.read(4) == ZIP_START else _read_legacy(file, machine)
            yield TorchFile(content, tuple(sorted(machine.unknown)))
    except _RunsCodeError as error:
        got = f"would run code to be read: it names {error}, and only plain tensors are accepted"
        do = "If you trust its source, open it there and save its tensors with safetensors.torch.save_file."
        raise CheckpointError(str(path), got, do) from error
    except _DAMAGE as error:
        pass_on(error)
        got = f"is not a readable weights file ({in_one_line(error)})"
        raise CheckpointError(str(path), got, "Copy it again, or save its tensors with safetensors.") from error


class _RunsCodeError(Exception):
    """The file names a function that would run code."""


@dataclass(frozen=True)
class _Global:
    """A name in the file, of a class or function. It is never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The memory of tensors: how to read it, and its elements; `offset` where it is a view of another one."""

    load: Callable[[torch.dtype], Tensor]
    dtype: torch.dtype
    numel: int
    offset: int = 0


@dataclass
class _NumpyType:
    """numpy.dtype of a code like `f4`; the byte order is told by its state."""

    code: object
    order: object = "="

    @property
    def torch(self) -> torch.dtype | None:
        """The same type of torch; None where torch has none, or the bytes are in big-endian order."""
        return _NUMPY.get(self.code) if isinstance(self.code, str) and self.order in ("=", "<", "|") else None


class _NewArray(Unknown):
    """A numpy array whose state is not known yet."""


class _Machine:
    """Runs pickles; `unknown` collects the names that were replaced by `Unknown`s.

    With `arrays` numpy arrays and tensors of plain pickles are made, and counted in `made`. Beside torch's weights
    nobody asks for them.
    """

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        self.arrays = False
        self.made = 0

    def run(  # noqa: PLR0912, PLR0915 - one branch per instruction
        self, stream: BinaryIO, storage: Callable[..., object] | None = None
    ) -> object:
        """The next object of `stream`; `storage` takes the parts of a persistent id."""
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[Any, Any] = {}
        places: dict[int, list[Any]] = {}  # of arrays in the memo

        def remember(key: Any) -> None:
            memo[key] = stack[-1]
            if isinstance(stack[-1], _NewArray):
                places.setdefault(id(stack[-1]), []).append(key)

        def popped() -> list[Any]:
            nonlocal stack
            items, stack = stack, marks.pop()
            return items

        for op, arg, _ in pickletools.genops(stream):
            name = op.name
            if name in _LITERALS:
                stack.append(arg)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[arg])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                remember(arg)
            elif name == "MEMOIZE":
                remember(len(memo))
            elif name == "MARK":
                marks.append(stack)
                stack = []
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name in ("EMPTY_LIST", "EMPTY_SET"):
                stack.append([])
            elif name == "TUPLE":
                items = popped()
                stack.append(tuple(items))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(_last(stack, count))]
            elif name in ("LIST", "FROZENSET"):
                items = popped()
                stack.append(items)
            elif name == "DICT":
                items = popped()
                stack.append({})
                _set_items(stack[-1], items)
            elif name == "SETITEM":
                items = _last(stack, 2)
                del stack[-2:]
                _set_items(stack[-1], items)
            elif name == "SETITEMS":
                items = popped()
                _set_items(stack[-1], items)
            elif name == "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            elif name in ("APPENDS", "ADDITEMS"):
                items = popped()
                _extend(stack[-1], items)
            elif name == "GLOBAL":
                stack.append(_global(*str(arg).split(" ", 1)))
            elif name == "STACK_GLOBAL":
                module, attribute = stack.pop(-2), stack.pop()
                stack.append(_global(module, attribute))
            elif name in ("EXT1", "EXT2", "EXT4"):
                stack.append(_Global(f"copyreg extension {arg}"))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments = stack.pop()
                stack[-1] = self._made(stack[-1], arguments)
            elif name == "NEWOBJ_EX":
                del stack[-1]
                arguments = stack.pop()
                stack[-1] = self._made(stack[-1], arguments)
            elif name == "INST":
                items = popped()
                stack.append(self._made(_global(*str(arg).split(" ", 1)), items))
            elif name == "OBJ":
                items = popped()
                stack.append(self._made(items[0], items[1:]))
            elif name == "BUILD":
                state = stack.pop()  # attributes of an object that is not made, unless it is an array
                built = self._built(stack[-1], state)
                if built is not stack[-1]:
                    memo.update(dict.fromkeys(places.pop(id(stack[-1]), ()), built))
                    stack[-1] = built
            elif name in ("BINPERSID", "PERSID"):
                identity = stack.pop() if name == "BINPERSID" else arg
                if storage is None or not isinstance(identity, (tuple, list)):
                    raise ValueError(f"a reference to {_short(identity)}")
                stack.append(storage(*identity))
            elif name == "POP":
                if stack:
                    stack.pop()
                else:
                    popped()
            elif name == "POP_MARK":
                popped()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"a pickle instruction {name}")
        raise EOFError

    def _made(self, what: object, arguments: Any) -> object:
        """What stands for `what(*arguments)`."""
        name = what.name if isinstance(what, _Global) else f"a {type(what).__name__}"
        made: Any = Unknown(name)
        if name == "collections.OrderedDict":
            made = {}
            for key, value in arguments[0] if arguments else ():
                _set_items(made, [key, value])
        elif name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            made = _tensor(*arguments[:4])
        elif name == "torch._utils._rebuild_tensor_v3":
            dtype = getattr(torch, arguments[6].name.removeprefix("torch."))
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"a tensor of type {_short(arguments[6].name)}")
            storage, offset, size, stride = arguments[:4]
            made = _tensor(storage, offset, size, stride, dtype)
        elif name in _PARAMETERS:
            made = arguments[0]
        elif name == "torch._tensor._rebuild_from_type_v2":
            made = self._made(arguments[0], arguments[2])
        elif self.arrays and name in (*_NEW_ARRAY, *_ARRAY_OF_BUFFER, "numpy.dtype", _NESTED, "_codecs.encode"):
            made = self._of_plain_pickle(name, arguments)
        elif name not in _HARMLESS:
            self.unknown.add(name)
        return made

    def _of_plain_pickle(self, name: str, arguments: Any) -> object:
        if name == "numpy.dtype":
            return _NumpyType(arguments[0])
        if name == "_codecs.encode":  # protocol 2 has no bytes
            text, encoding = arguments
            return text.encode("latin-1") if encoding == "latin1" and isinstance(text, str) else Unknown(name)
        if name in _NEW_ARRAY:
            return _NewArray("numpy.ndarray")
        if name == _NESTED:
            inner = _Machine()
            storage = _read_legacy(io.BytesIO(arguments[0]), inner, plain=False)
            self.unknown |= inner.unknown
            self.made += 1
            return storage
        data, dtype, shape, order = arguments
        return self._array(data, dtype, shape, fortran=order == "F") or Unknown("numpy.ndarray")

    def _built(self, made: object, state: object) -> object:
        """`made` with `state`: an array or its type; other objects stay as they are."""
        if isinstance(made, _NumpyType) and isinstance(state, tuple) and len(state) > 1:
            made.order = state[1]
        if isinstance(made, _NewArray) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            return self._array(data, dtype, shape, fortran=bool(fortran)) or made
        return made

    def _array(self, data: object, dtype: object, shape: object, *, fortran: bool) -> object | None:
        """The array as a tensor in the file; None for types that torch has not. Raises ValueError for damage."""
        kind = dtype.torch if isinstance(dtype, _NumpyType) else None
        if kind is None:
            self.unknown.add("numpy.ndarray")
            return None
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin-1")
        size = _numbers(shape)
        if not isinstance(data, (bytes, bytearray)) or len(data) != math.prod(size) * kind.itemsize:
            raise ValueError(f"an array of shape {size} whose data are another number of bytes")
        steps = list(itertools.accumulate(size if fortran else size[::-1], operator.mul, initial=1))[:-1]
        content = bytes(data)
        self.made += 1
        return StoredTensor(
            lambda dtype: _as_tensor(content, dtype), kind, 0, size, tuple(steps if fortran else steps[::-1])
        )


def _short(value: object) -> str:
    """A plain value in at most 60 characters; a container, whose text may be endless, by its type."""
    return ascii(value)[:60] if isinstance(value, _KEYS) else f"a {type(value).__name__}"


def _global(module: object, attribute: object) -> _Global:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("a name that is no text")
    root = module.partition(".")[0]
    if root in _RUNS_CODE or (root in ("builtins", "__builtin__", "io", "_io") and attribute in _RUNS_CODE_BUILTINS):
        raise _RunsCodeError(f"{module}.{attribute}")
    return _Global(f"{module}.{attribute}")


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("a pickle that takes more than it has")
    return stack[-count:]


def _set_items(target: object, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError(f"items for a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key if isinstance(key, _KEYS) else f"a {type(key).__name__}"] = value


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Unknown):  # the items of an unknown list are not kept
        raise ValueError(f"items for a {type(target).__name__}")


def _tensor(storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None = None) -> object:
    """A tensor in `storage`. Raises ValueError where it would reach outside."""
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor in a {type(storage).__name__}")
    numel = storage.numel
    if dtype is not None:  # the storage counts bytes
        numel //= dtype.itemsize
    size, stride = _numbers(size), _numbers(stride)
    (start,) = _numbers((offset,))
    last = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= numel:
        raise ValueError(f"a tensor that ends at {_short(last)} in a storage of {_short(numel)} elements")
    start = start + storage.offset if math.prod(size) else 0
    return StoredTensor(storage.load, dtype or storage.dtype, start, size, stride)


def _numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMS:
        raise ValueError(f"a shape that is {_short(values)}")
    if not all(type(n) is int and 0 <= n < 2**62 for n in values):
        raise ValueError("a shape or stride that is no number of elements")
    return tuple(values)


def _dtype_of(storage_type: object) -> torch.dtype:
    name = storage_type.name if isinstance(storage_type, _Global) else ""
    dtype = _DTYPES.get(name.rpartition(".")[2])
    if dtype is None:
        raise ValueError(f"a storage of type {_short(name)}")
    return dtype


def _key(key: object) -> str:
    if not isinstance(key, (str, int)):
        raise ValueError(f"a storage named by {_short(key)}")
    return str(key)


def _as_tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


# -- zip files ----------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO, machine: _Machine) -> object:
    """`<name>/data.pkl` is the structure, `<name>/data/<key>` the memory of a storage. All are stored as they are."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip file without weights of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise ValueError("a TorchScript archive, which is a program")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
        raise ValueError("entries of the zip file are compressed or encrypted, torch stores them as they are")
    size = file.seek(0, 2)
    if sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError("entries of the zip file overlap")
    if f"{prefix}byteorder" in entries and archive.read(f"{prefix}byteorder") != b"little":
        raise ValueError("the byte order is not little-endian")

    @cache
    def load(key: str, dtype: torch.dtype) -> Tensor:
        return _as_tensor(archive.read(f"{prefix}data/{key}"), dtype)

    def storage(kind: object, storage_type: object, key: object, location: object, numel: object) -> object:
        dtype, name = _dtype_of(storage_type), _key(key)
        bytes_there = entries[f"{prefix}data/{name}"].file_size
        if kind != "storage" or type(numel) is not int or not 0 <= numel * dtype.itemsize <= bytes_there:
            raise ValueError(f"a storage of {_short(numel)} elements in {bytes_there} bytes")
        return _Storage(lambda dtype: load(name, dtype), dtype, numel)

    return machine.run(io.BytesIO(archive.read(pickles[0])), storage)


# -- before torch 1.6 ---------------------------------------------------------------------------------------------


class _Clipped:
    """A file of `size` bytes that is never asked for more: a claimed length allocates nothing."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size))


def _read_legacy(file: BinaryIO, machine: _Machine, *, plain: bool = True) -> object:
    """Pickles of a magic number, a version, the system, the structure and the keys; then each storage.

    If it is not torch's, and `plain` is set, the one pickle that it is, with its arrays.
    """
    end = file.seek(0, 2)
    file.seek(0)
    stream: Any = _Clipped(file, end)
    machine.arrays = plain
    first = machine.run(stream)
    machine.arrays = False
    if first != _MAGIC_NUMBER and machine.made and file.tell() == end:
        return first
    if first != _MAGIC_NUMBER:
        raise ValueError("neither a zip file nor a stream of torch.save")
    version, system = machine.run(stream), machine.run(stream)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("another version of torch's format, or another byte order than little-endian")
    found: dict[str, tuple[int, int]] = {}
    declared: dict[str, tuple[torch.dtype, int]] = {}

    @cache
    def load(key: str, dtype: torch.dtype) -> Tensor:
        position, count = found[key]
        file.seek(position)
        return _as_tensor(file.read(count), dtype)

    def storage(kind: object, storage_type: object, *rest: object) -> object:
        if kind == "module":  # a class with its source, which is not looked at
            return storage_type
        key, _, numel, view = rest
        dtype, name = _dtype_of(storage_type), _key(key)
        (elements,) = _numbers((numel,))
        if kind != "storage" or declared.setdefault(name, (dtype, elements)) != (dtype, elements):
            raise ValueError(f"storage {_short(name)} is told in two ways")
        first = 0
        if view is not None:
            if not isinstance(view, tuple) or len(view) != 3:
                raise ValueError("a view of a storage without a place")
            first, viewed = _numbers(view[1:])
            if first + viewed > elements:
                raise ValueError("a view beyond its storage")
            elements = viewed
        return _Storage(lambda dtype: load(name, dtype), dtype, elements, first)

    content = machine.run(stream, storage)
    keys = machine.run(stream)
    if not isinstance(keys, list) or {_key(key) for key in keys} != set(declared):
        raise ValueError("the list of storages is not that of the tensors")
    position = file.tell()
    for key in map(_key, keys):
        dtype, elements = declared[key]
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        found[key] = position + 8, count * dtype.itemsize
        position += 8 + found[key][1]
        if count < elements or position > end:
            raise ValueError(f"storage {_short(key)} is cut off")
    return content
