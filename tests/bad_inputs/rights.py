"""File permissions that hold for root, too: without the capabilities that look past them."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

VERSION_3 = 0x20080522
LOOKS_PAST = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("process", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def without_privileges() -> Iterator[bool]:
    """Let permissions hold inside; False where that cannot be had (root, and no Linux)."""
    if os.geteuid() != 0:
        yield True
        return
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "capset"):
        yield False
        return
    header, sets = _Header(VERSION_3, 0), (_Sets * 2)()
    library.capget(ctypes.byref(header), sets)
    before = sets[0].effective
    sets[0].effective = before & ~LOOKS_PAST
    done = library.capset(ctypes.byref(header), sets) == 0
    try:
        yield done
    finally:
        sets[0].effective = before
        library.capset(ctypes.byref(header), sets)
