"""Read a pickle without running it: its opcodes are followed, and what they would import or call is only written down.

Python's own reader imports whatever a file names and calls it. This one knows plain values, lists, tuples and dicts; a class or
function becomes a `Global`, which is a name, and a call becomes a `Called`, which is the name and the arguments. Nothing is
imported, and nothing of the file's choice is called. A name that the caller does not expect is an error.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from typing import Any

DEEPEST = 64  # lists inside of lists, as the opcode MARK begins them


class Global:
    """A class or function that a pickle names, as ``module.name``; equal to nothing but itself."""

    __match_args__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Called:
    """``name(*args)``, which was not called, and what its ``state`` would have been set to.

    It is compared and hashed by identity, as values of a pickle may be nested deeper than Python can compare.
    """

    __match_args__ = ("name", "args", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None


class Refused(ValueError):
    """A pickle that is not read."""


def loads(data: bytes, known: Collection[str], where: str) -> Any:
    """The value that the pickle ``data`` describes; ``known`` are the names, as ``module.name``, that may occur in it.

    Refused, in one line that begins with ``where``: an unknown name, a call of anything but a name, an opcode that neither
    `pickle` nor `torch.save` writes for plain data, what is nested too deeply, and bytes that are no whole pickle.

    >>> import pickle, os
    >>> loads(pickle.dumps({"step": 3, "sizes": [1.5, None]}), (), "state")
    {'step': 3, 'sizes': [1.5, None]}
    >>> loads(pickle.dumps(os.system), (), "state")
    Traceback (most recent call last):
    olmo_fn.formats.pickles.Refused: state: it names posix.system, which no such file needs; it is not read
    """
    machine = _Machine(known, where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            operation = OPERATIONS.get(opcode.name)
            if operation is None:
                raise Refused(f"{where}: it uses {opcode.name}, which no such file needs; it is not read")
            operation(machine, argument)
        (value,) = machine.stack
    except Refused:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused(f"{where}: damaged, or no pickle ({type(error).__name__})") from None
    return value


class _Machine:
    """The stack of a pickle, one for each mark that is open, and its memo."""

    def __init__(self, known: Collection[str], where: str) -> None:
        self.known, self.where = frozenset(known), where
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        if len(self.below) == DEEPEST:
            raise Refused(f"{self.where}: it is nested more than {DEEPEST} deep")
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pack(self, count: int) -> None:
        """The last ``count`` values as a tuple."""
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError
        self.stack[-count:] = [items]

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.known:
            raise Refused(f"{self.where}: it names {full[:100]}, which no such file needs; it is not read")
        self.stack.append(Global(full))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self.name(module, name)

    def call(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise TypeError
        plain = function.name == "collections.OrderedDict" and not args
        self.stack.append({} if plain else Called(function.name, args))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Called:
            target.state = state
        elif type(target) is not dict:  # of an OrderedDict, whose attributes are not read
            raise TypeError

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target += items
        elif type(target) is not Called:
            raise TypeError

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, bool, type(None), Called, Global):
                raise TypeError
            if type(target) is dict:
                target[key] = value
            elif type(target) is not Called:
                raise TypeError

    def persistent(self, _: Any) -> None:
        self.stack.append(Called("persistent", (self.stack.pop(),)))

    def keep(self, key: int | None) -> None:
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]


def _ignore(machine: _Machine, argument: Any) -> None:
    return


OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": _ignore, "FRAME": _ignore, "STOP": _ignore,
    "NONE": lambda m, _: m.push(None), "NEWTRUE": lambda m, _: m.push(True), "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),  # none has more than 255 bytes
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _Machine.push),
    "EMPTY_LIST": lambda m, _: m.push([]), "EMPTY_DICT": lambda m, _: m.push({}), "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push([]), "ADDITEMS": lambda m, _: m.append(m.since_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())), "MARK": _Machine.mark,
    "TUPLE1": lambda m, _: m.pack(1), "TUPLE2": lambda m, _: m.pack(2), "TUPLE3": lambda m, _: m.pack(3),
    "APPEND": lambda m, _: m.append([m.stack.pop()]), "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]), "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, names: m.name(*names.split(" ")), "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call, "NEWOBJ": _Machine.call, "BUILD": _Machine.build, "BINPERSID": _Machine.persistent,
    "BINPUT": _Machine.keep, "LONG_BINPUT": _Machine.keep, "MEMOIZE": lambda m, _: m.keep(None),
    "BINGET": lambda m, key: m.push(m.memo[key]), "LONG_BINGET": lambda m, key: m.push(m.memo[key]),
}  # fmt: skip
