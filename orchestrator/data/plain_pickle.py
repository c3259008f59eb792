"""Pickles of nothing but arrays and plain values, read without letting the file call anything.

A pickle is a program for a small stack machine, which can name any function and have it called. Here the opcodes of
pickle protocols 0 to 2 that CIFAR-10's files consist of are carried out by hand: the only names are those with which
numpy rebuilds an array, and they are compared, never looked up or called.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
_NDARRAY = ("numpy", "ndarray")
_DTYPE = ("numpy", "dtype")

_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "UNICODE", "BINUNICODE"}
_BYTES = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass
class _DType:
    code: bytes


@dataclass
class _Array:
    """An array between being made and being filled; BUILD gives it its values."""

    values: NDArray[Any] | None = None


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._do(opcode.name, argument)
        raise ValueError("it has no end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _BYTES:
            # Python 2's strings are bytes; pickletools gives one character for each.
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUT:
            self.memo[int(argument)] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[int(argument)])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = stack[-count:]
            del stack[-count:]
            stack.append(tuple(items))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            if (module, attribute) not in (_RECONSTRUCT, _NDARRAY, _DTYPE):
                raise ValueError(f"it names {module}.{attribute}")
            stack.append(_Name(module, attribute))
        else:
            self._contain(name)

    def _contain(self, name: str) -> None:
        """Containers, and the two opcodes that make an array."""
        stack = self.stack
        match name:
            case "PROTO":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST":
                stack.append(self._since_mark())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "DICT":
                stack.append(_entries(self._since_mark()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1].update(_entries([key, value]))
            case "SETITEMS":
                items = self._since_mark()
                stack[-1].update(_entries(items))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_make(function, arguments))
            case "BUILD":
                state = stack.pop()
                _fill(stack[-1], state)
            case _:
                raise ValueError(f"it holds the opcode {name}")

    def _since_mark(self) -> list[Any]:
        first = self.marks.pop()
        items = self.stack[first:]
        del self.stack[first:]
        return items


def _entries(items: list[Any]) -> dict[bytes, Any]:
    """Keys and values in turn. Only bytes are keys: hashing what a file has nested deeply would exhaust the C stack."""
    if not all(isinstance(key, bytes) for key in items[::2]):
        raise ValueError("it holds a dictionary with a key that is no string")
    return dict(zip(items[::2], items[1::2], strict=True))


def _make(function: object, arguments: Any) -> _Array | _DType:
    """What numpy's own functions would make of these arguments."""
    if function == _Name(*_RECONSTRUCT) and arguments[0] == _Name(*_NDARRAY):
        return _Array()
    if function == _Name(*_DTYPE) and isinstance(arguments[0], bytes):
        return _DType(arguments[0])
    raise ValueError(f"it calls {function if isinstance(function, _Name) else type(function).__name__}")


def _fill(target: object, state: Any) -> None:
    if isinstance(target, _DType):
        return  # byte order and fields, which one-byte numbers do not have
    if not isinstance(target, _Array):
        raise ValueError(f"it fills a {type(target).__name__}")
    _, shape, dtype, is_fortran, content = state
    if not isinstance(dtype, _DType) or dtype.code != b"u1":
        raise ValueError("it holds an array of something else than bytes")
    flat = np.frombuffer(content, np.uint8)
    target.values = flat.reshape(shape, order="F" if is_fortran else "C")


def loads(data: bytes) -> dict[bytes, Any]:
    """The dictionary in a pickle: keys and strings are bytes, arrays (uint8) are numpy's; nothing is called.

    Raises:
        ValueError: it is truncated, damaged, or holds anything but plain values and arrays of bytes.
    """
    try:
        result = _Machine().run(data)
        return {key: value.values if isinstance(value, _Array) else value for key, value in result.items()}
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeError) as error:
        raise ValueError(f"it is damaged ({error})") from error
