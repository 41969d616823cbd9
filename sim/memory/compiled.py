"""The compiler for loops over pages, with a cache that follows the source text."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def _cache_folder() -> Path:
    """Folder for machine code, named by the source: numba's own check misses a change in another file."""
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        if b"compiled" in (text := source.read_bytes()):
            digest.update(text)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for root in (Path(base), Path(tempfile.gettempdir())):
        folder = root / "overcommit" / digest.hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="overcommit-"))


# numba's type stubs know neither this setting nor all options.
_config: Any = numba.config
_njit: Any = numba.njit

_config.CACHE_DIR = str(_cache_folder())
# The loops allocate nothing, so they need no run-time reference counts.
_OPTIONS = {"error_model": "numpy", "_nrt": False}


def compiled(loop: Loop) -> Loop:
    """Compile *loop* on first use; later processes load the machine code from the cache."""
    return cast(Loop, _for_all_integers(_njit(cache=True, **_OPTIONS)(loop)))


def inlined(loop: Loop) -> Loop:
    """Compile *loop* into its callers only; it has no entry from Python."""
    dispatcher = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, **_OPTIONS)(loop)
    return cast(Loop, _for_all_integers(dispatcher))


def quick(loop: Loop) -> Loop:
    """Call a compiled loop whose arguments have the same types every time.

    numba finds the types of NamedTuples of arrays anew at each call, which takes longer than a short loop does.
    """
    entry: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal entry
        if entry is not None:
            return entry(*arguments)
        result = loop(*arguments)
        versions = [*cast(Any, loop).overloads.values()]
        if len(versions) == 1:
            entry = versions[0].entry_point
        return result

    return cast(Loop, call)


def _for_all_integers(dispatcher: Any) -> Any:
    """Let compiled callers share one version: numba would make one for each constant and width of an argument."""
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template(
        tuple(_widened(kind) for kind in args), {name: _widened(kind) for name, kind in kws.items()}
    )
    return dispatcher


def _widened(kind: Any) -> Any:
    plain: Any = numba.types
    kind = plain.unliteral(kind)
    narrow = isinstance(kind, plain.Integer) and kind is not plain.uint64
    return plain.int64 if narrow else kind
