"""What a process has freed goes back to the system, though something beside it is still in use."""

import ctypes

import pytest

from benchmarks.memory import anonymous_bytes
from tbjax import heap
from tbjax.heap import give_back

MIB = 1 << 20


@pytest.mark.skipif(heap._trim() is None, reason="the C library keeps nothing, or does not say how to ask for it")
def test_what_was_freed_below_something_in_use_is_given_back():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 16_000, 8_000
    pieces = [library.malloc(size) for _ in range(count)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[:-1]:
        library.free(piece)
    before = anonymous_bytes()
    give_back()
    assert before - anonymous_bytes() > 0.8 * size * count
    library.free(pieces[-1])


def test_where_the_c_library_cannot_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_trim", lambda: None)
    give_back()
