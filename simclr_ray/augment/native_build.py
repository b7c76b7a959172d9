"""Compile `native.c`: into the wheel by `hatch_build.py`, or on the machine where it runs.

The wheel holds one shared library for each of x86-64's levels, and a process loads the best that
its processor knows: -march=x86-64-v3 was measured at the speed of -march=native, plain x86-64 at
0.4 of it, all with the same bytes (benchmarks/results/native.json). One file a level, where the
compiler could also put all into one (`target_clones`): gcc 11 and clang 14 refuse that for levels,
and a level that is a file of its own can be tested by itself. A library's name holds a digest of
source and flags, so one that was built from another source is never loaded.

Imports the standard library alone: `hatch_build.py` loads this file by its path.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SETTING = "SIMCLR_RAY_NATIVE"
SOURCE = Path(__file__).with_name("native.c")
# No contraction: a fused multiply-add rounds differently. The others change no result.
EXACT = (
    "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    # All values are finite and zeros alike, so that min and max may be one instruction each.
    "-ffinite-math-only", "-fno-signed-zeros",
)  # fmt: skip
SHARED = ("-shared", "-fPIC", "-lm")
# Best first. 256 bits, as -march=native chooses for processors with AVX-512, some of which lower
# their clock under wider vectors.
X86_LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v4": ("-march=x86-64-v4", "-mprefer-vector-width=256"),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64": ("-march=x86-64",),
}
# What /proc/cpuinfo calls the features of a level (x86-64 psABI); `abm` is LZCNT.
_V3 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
FEATURES = {
    "x86-64-v4": frozenset(_V4.split()),
    "x86-64-v3": frozenset(_V3.split()),
    "x86-64": frozenset[str](),
}
COMPILE_TIMEOUT_S = 120


class NativeBuildError(Exception):
    """`native.c` cannot be compiled here; the message is one line."""


def find_compiler() -> str | None:
    """Return the path of a C compiler, that of $CC first, or None."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None)


def build_for_package(folder: Path) -> list[Path]:
    """Compile one library for each level of this machine's architecture into `folder`.

    Raises:
        NativeBuildError: There is no compiler, or it refuses one of them.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeBuildError("no C compiler")
    made = [(folder / library_name(level), flags) for level, flags in _levels().items()]
    for path, flags in made:
        compile_library(compiler, flags, path)
    return [path for path, _ in made]


def find_packaged() -> Path | None:
    """Return the library of the installed package that suits this processor best, or None."""
    paths = (SOURCE.with_name(library_name(level)) for level in _levels() if runs_here(level))
    return next(filter(Path.exists, paths), None)


def runs_here(level: str) -> bool:
    """Return whether this processor has the features of a level; of other architectures, True."""
    return FEATURES.get(level, frozenset()) <= frozenset(_processor().split())


def build_into_cache(compiler: str) -> Path:
    """Return the library tuned to this very machine, compiling it unless it is in the cache.

    Raises:
        NativeBuildError: The compiler refuses.
        OSError: No folder can hold it.
    """
    identity = [SOURCE.read_text(), compiler, " ".join(EXACT), platform.machine(), _processor()]
    target = _cache() / f"views-{_digest(identity)}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        try:
            compile_library(compiler, ("-march=native",), made)
        except NativeBuildError:  # some compilers know no native
            compile_library(compiler, (), made)
        made.replace(target)  # whole or not at all: several actors start at once
    return target


def library_name(level: str) -> str:
    """Return the file name of the package's library for a level, which also names its source."""
    flags = " ".join([*EXACT, *_levels().get(level, ())])
    return f"_native_{_digest([SOURCE.read_text(), flags])}_{level}.so"


def level_of(library: Path) -> str:
    """Return the level in a file name of `library_name`."""
    return library.stem.rpartition("_")[2]


def compile_library(compiler: str, tuning: Iterable[str], made: Path) -> None:
    """Compile `native.c` to the shared library `made`.

    Raises:
        NativeBuildError: The compiler refuses, or does not end.
    """
    command = [compiler, *EXACT, *tuning, str(SOURCE), *SHARED, "-o", str(made)]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        telling = next((line for line in lines if "error" in line), lines[-1])
        raise NativeBuildError(f"{compiler}: {telling[:300]}") from error
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{compiler}: not done in {COMPILE_TIMEOUT_S} s") from error
    except OSError as error:
        raise NativeBuildError(f"{compiler}: {error}") from error


def _levels() -> dict[str, tuple[str, ...]]:
    """Return name and flags of each library that a package for this machine holds, best first."""
    machine = platform.machine()
    return X86_LEVELS if machine in ("x86_64", "AMD64") else {machine: ()}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cache() -> Path:
    """Return a folder that only this user can write: what lies there is loaded as code."""
    places: list[Path] = []
    with suppress(RuntimeError):  # a user may have no home
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        places.append(base / "simclr_ray" / "native")
    places.append(Path(tempfile.gettempdir()) / f"simclr-ray-{os.getuid()}")
    for folder in places:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat()  # a link could be pointed elsewhere after this look
        except OSError:
            continue
        mine = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
        if mine and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise OSError("no folder of this user's to keep the compiled library in")


@functools.cache
def _processor() -> str:
    """Return the features of this processor: a home may be shared by machines of several kinds."""
    if not sys.platform.startswith("linux"):
        return platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = (line for line in lines if line.startswith(("flags", "Features")))
        return next(named, "").partition(":")[2]
    return ""
