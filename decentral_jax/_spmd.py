"""Functions that `dj.Workers.spmd` returns, and how their arguments are told apart."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, ParamSpec, Self, TypeVar

import jax
from jax.core import Tracer
from jax.stages import Wrapped

from decentral_jax._exchange.numbers import PyTree
from decentral_jax._validation import check_arrays
from decentral_jax._watch import calls
from decentral_jax.processes import agree

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of a step: each worker's own, shared by all workers, or static.

    Attributes:
      shared: Names of parameters whose arguments all workers share.
      static: Names of parameters whose arguments are not arrays.
    """

    shared: tuple[str, ...]
    static: tuple[str, ...]

    @classmethod
    def of(
        cls,
        fn: Callable[..., Any],
        shared_argnames: str | Sequence[str],
        static_argnames: str | Sequence[str],
    ) -> Self:
        """Checks the names that `dj.Workers.spmd` receives."""
        shared = _names("shared_argnames", shared_argnames)
        static = _names("static_argnames", static_argnames)
        if not (shared or static):
            return cls((), ())
        try:
            parameters = inspect.signature(fn).parameters
        except ValueError:
            raise ValueError(
                "shared_argnames and static_argnames need a function with named "
                f"parameters, got {fn!r}: wrap it in a def."
            ) from None
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        known = [name for name, p in parameters.items() if p.kind not in variadic]
        for name in shared + static:
            if name not in known:
                raise ValueError(
                    "shared_argnames and static_argnames must name parameters of "
                    f"{getattr(fn, '__name__', 'fn')}, got {name!r}: pass names from "
                    f"{known}."
                )
        if twice := set(shared) & set(static):
            raise ValueError(
                f"shared_argnames and static_argnames both name {sorted(twice)}: "
                "arrays are shared, other values are static."
            )
        return cls(shared, static)

    def separate(
        self, fn: Callable[..., R], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[PyTree, PyTree, dict[str, Any], Callable[[PyTree, PyTree], R]]:
        """Separates the arguments of one call.

        Args:
          fn: The function.
          args: Its positional arguments.
          kwargs: Its keyword arguments.

        Returns:
          The workers' own arguments, the shared ones, the static ones, and a function
          of the first two that calls `fn` with all three.
        """
        if not (self.shared or self.static):
            return (args, dict(kwargs)), {}, {}, lambda own, _: fn(*own[0], **own[1])
        signature = inspect.signature(fn)
        given = signature.bind(*args, **kwargs).arguments
        shared = {name: given.pop(name) for name in self.shared if name in given}
        static = {name: given.pop(name) for name in self.static if name in given}

        def call(own, shared):
            bound = inspect.BoundArguments(signature, own | shared | static)  # pyright: ignore
            return fn(*bound.args, **bound.kwargs)

        return dict(given), shared, static, call


def _names(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for each in names:
        if not isinstance(each, str):
            raise TypeError(
                f"{name} must hold names of parameters, got {each!r}: pass strings."
            )
    return names


class Spmd(Generic[P, R]):
    """A compiled function of all workers, as `Workers.spmd` returns it.

    Attributes that this class does not define are those of the jitted function.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        jitted: Wrapped,
        arguments: Arguments,
        sizes: Mapping[str, int],
        own_mesh: Callable[[], AbstractContextManager],
        single_process: bool,
    ):
        functools.update_wrapper(self, fn)
        self._fn, self._arguments, self._sizes = fn, arguments, sizes
        self._jitted = jitted
        self._own_mesh = own_mesh
        self._call = jitted if single_process else _compared(jitted, arguments, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self._own_mesh():
                return self._call(*args, **kwargs)
        except TypeError:
            # Check only after an error: in every step, the check of a large tree would
            # take too long.
            own, shared, *_ = self._arguments.separate(self._fn, args, kwargs)
            check_arrays("arguments", own)
            check_arrays("shared arguments", shared)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def one_worker(
        self, *args: Any, **kwargs: Any
    ) -> tuple[PyTree, PyTree, Callable[[PyTree, PyTree], R], Mapping[str, int]]:
        """Returns what `dj.communication_cost` traces, in every layout.

        Returns:
          The workers' own arguments, with worker axes; the shared arguments; the
          function of both for one worker; and the sizes of the worker axes.
        """
        own, shared, _, call = self._arguments.separate(self._fn, args, kwargs)
        return own, shared, call, self._sizes


def _compared(
    jitted: Wrapped, arguments: Arguments, fn: Callable[..., Any]
) -> Callable[..., Any]:
    """Wraps a jitted function to compare its programs between processes.

    The first call with arguments of new types compares the lowered program with those
    of the other processes. A different topology, option, or version in one process
    would result in another program, whose collectives would hang.
    """
    seen = set()
    name = getattr(jitted, "__name__", "function")

    @functools.wraps(jitted)
    def run(*args, **kwargs):
        own, shared, static, _ = arguments.separate(fn, args, kwargs)
        leaves, structure = jax.tree.flatten((own, shared))
        # One comparison per combination of types and static values.
        key = (*static.items(), structure, *(jax.typeof(leaf) for leaf in leaves))
        if key not in seen:
            program = jitted.lower(*args, **kwargs).as_text().encode()
            agree(f"the program of {name}", hashlib.sha256(program).hexdigest())
            seen.add(key)
        # While being traced, the function does not run.
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return jitted(*args, **kwargs)
        with calls(name):
            results = jitted(*args, **kwargs)
        calls.returned(results)
        return results

    return run
