"""Identities: what tells a judge from any other, the same in every process.

Knows how Python objects are made: functions by their code and what they reach, everything else as
pickle takes it apart. Writes no pickle, reads none, and knows nothing of judging.
"""

import dis
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import PurePath
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from trimtab.errors import TrimtabError
from trimtab.lm import LM

PLAIN = (str, int, float, complex, bool, type(None))


def scorer_identity(scorer: Any) -> str | TrimtabError:
    """What tells a scorer from any other, also in another process: a hash of all it is made of.

    That is the code of its functions and classes, what they hold, and the globals that they name;
    of code that is installed, the name. A text as attribute ``identity``, of the scorer or of a
    part of it, stands for all that. Where something cannot be told from another of its kind, such
    as a lock or an open file, the error that says so comes back: a journal raises it.
    """
    try:
        return _Teller()(scorer)
    except Exception as error:  # anything may be raised by what a user's object does when asked
        name = getattr(scorer, "__name__", None) or type(scorer).__name__
        return TrimtabError(
            f"whether stored scores are of the judge {name} cannot be told ({error}). Give it a "
            'text that you change with it, judge.identity = "my judge, version 1", or store '
            "nothing: out=None"
        )


def weights_identity(model: Module) -> str:
    """A hash of some of all weights of a large model."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, len(flat) // 16)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Teller:
    """Values to texts: equal for values that are made alike, without addresses."""

    def __init__(self) -> None:
        # By id, with the value itself: an id may be given again once its value is gone.
        self._told: dict[int, tuple[Any, str]] = {}

    def __call__(self, value: Any) -> str:
        if type(value) in PLAIN:
            return f"{type(value).__name__} {value!r}"
        if id(value) not in self._told:
            self._told[id(value)] = value, f"number {len(self._told)}"  # where a cycle ends
            told = "\n".join([type(value).__name__, *self._parts(value)])
            self._told[id(value)] = value, hashlib.sha256(told.encode(errors="replace")).hexdigest()
        return self._told[id(value)][1]

    def _parts(self, value: Any) -> Iterable[str]:
        """The texts of what a value is made of."""
        if isinstance(value, type):
            return self._class(value)
        if isinstance(own := getattr(value, "identity", None), str):
            return ["identity", own]
        if type(value) in self._exact:
            return self._exact[type(value)](self, value)
        for kind, parts in self._kinds.items():
            if isinstance(value, kind):
                return parts(self, value)
        if is_dataclass(value) and _is_ours(type(value)):  # without what it keeps beside its fields
            kept = {f.name: getattr(value, f.name) for f in fields(value)}
            return self._all(type(value), kept)
        if isinstance(getattr(value, "task", None), str) and hasattr(value, "tokenizer"):
            return self._all(type(value), value.task, value.model, value.tokenizer)  # a pipeline
        if hasattr(value, "get_vocab"):  # a tokenizer, which also keeps how it was last called
            return self._all(type(value), value.get_vocab())
        return self._reduced(value)

    def _all(self, *values: Any) -> Iterable[str]:
        return map(self, values)

    def _unordered(self, values: Any) -> Iterable[str]:
        return sorted(map(self, values))

    def _mapping(self, value: Any) -> Iterable[str]:
        return sorted(f"{self(k)}: {self(v)}" for k, v in value.items())

    def _tensor(self, value: Tensor) -> Iterable[str]:
        whole = value.detach().cpu()
        whole = (whole.to_dense() if whole.layout != torch.strided else whole).contiguous()
        raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        return self._all(str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest())

    def _model(self, value: LM) -> Iterable[str]:
        template = getattr(value.tokenizer, "chat_template", None)
        facts = value.describe(), str(value.model.dtype), template
        return self._all(*facts, weights_identity(value.model))

    def _named(self, kept: Mapping[str, Any], first: Iterable[str], names: Set[str]) -> list[str]:
        """What is kept under these names; of a module of one's own, what is named of it."""
        return [
            f"{name} {self._reached(kept[name], names - {name})}"
            for name in sorted(first)
            if name in kept
        ]

    def _reached(self, value: Any, names: Set[str]) -> str:
        if not isinstance(value, ModuleType):
            return self(value)
        kept = vars(value) if _is_own(value.__name__) else {}
        return " ".join([value.__name__, *self._named(kept, names, names)])

    def _function(self, value: FunctionType) -> Iterable[str]:
        name = f"{value.__module__}.{value.__qualname__}"
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        if not _is_own(value.__globals__.get("__name__", "__main__")):  # around one's own, perhaps
            return [name, *self._all(cells)]
        codes = [*_codes(value.__code__)]
        names = {name for code in codes for name in code.co_names}
        reached = self._named(value.__globals__, _globals(codes), names)
        held = value.__code__, value.__defaults__, value.__kwdefaults__, cells, vars(value)
        return [name, *self._all(*held), *reached]

    def _code(self, value: CodeType) -> Iterable[str]:
        return self._all(value.co_code, value.co_names, value.co_consts, value.co_exceptiontable)

    def _class(self, value: type) -> Iterable[str]:
        name = f"{value.__module__}.{value.__qualname__}"
        if not _is_own(value.__module__):
            return [name]
        callables = (FunctionType, staticmethod, classmethod)
        own = {
            n: member
            for n, member in vars(value).items()
            if isinstance(member, callables) or not (n.startswith("__") or n == "_abc_impl")
        }
        return [name, *self._all(list(value.__bases__), own)]

    def _reduced(self, value: Any) -> Iterable[str]:
        """Anything else by what pickle would make it of."""
        try:
            found = value.__reduce_ex__(4)
        except Exception as error:  # whatever a class raises that will not be taken apart
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TrimtabError(f"it holds a {kind}, which shows no content") from error
        if isinstance(found, str):  # the name of a global, which may stand for a function in it
            inner = getattr(value, "__wrapped__", None)
            return self._all(type(value), getattr(value, "__module__", None), found, inner)
        make, args, state, items, pairs = (*found, None, None, None)[:5]
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if not _is_cache(type(value), k)}
        return self._all(make, args, state, [*(items or ())], dict(pairs or ()))

    _exact: ClassVar[Mapping[type, "_Parts"]] = {
        **dict.fromkeys((dict, MappingProxyType), _mapping),
        **dict.fromkeys((set, frozenset), _unordered),
        **dict.fromkeys((list, tuple), lambda self, value: self._all(*value)),
        **dict.fromkeys((staticmethod, classmethod), lambda self, value: self._all(value.__func__)),
        bytes: lambda self, value: [hashlib.sha256(value).hexdigest()],
        FunctionType: _function,
        CodeType: _code,
        ModuleType: lambda self, value: [value.__name__],
        MethodType: lambda self, value: self._all(value.__func__, value.__self__),
        property: lambda self, value: self._all(value.fget, value.fset),
        cached_property: lambda self, value: self._all(value.func),
    }
    _kinds: ClassVar[Mapping[type, "_Parts"]] = {Tensor: _tensor, LM: _model}


_Parts = Callable[[_Teller, Any], Iterable[str]]


def _is_own(module: str) -> bool:
    """Whether code is the user's: of neither Python, nor Trimtab, nor an installed package."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "trimtab":
        return False
    if top == "__main__":  # whatever runs it: a notebook's is an installed program's
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & {*PurePath(file).parts}


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "trimtab"


def _is_cache(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), cached_property)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is set later
        return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code and those inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _globals(codes: list[CodeType]) -> set[str]:
    """The globals that codes read."""
    found = (step for code in codes for step in dis.get_instructions(code))
    return {str(step.argval) for step in found if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
