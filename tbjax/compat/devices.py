"""PyTorch's words for devices and for what they talk by, held against the machine.

    "cuda", "cuda:1", "nccl"     on NVIDIA GPUs
    "xla"                        on TPUs
    "cpu", "gloo"                between CPUs

JAX uses the devices that are there and chooses how they talk, so such a word changes nothing: it is accepted where it
says what is so, and raises where it says otherwise. CPU devices stand in for any other, as they do in tests and while
a mesh is tried on a laptop: there every word is accepted.
"""

import re
from typing import Any

import jax

# By the platform's name in JAX: the kinds of device that are meant by it, and the backends that its devices talk by.
KINDS = {"gpu": ("cuda", "gpu", "rocm"), "tpu": ("xla", "tpu"), "cpu": ("cpu",)}
BACKENDS = {"gpu": ("nccl", "rccl"), "tpu": ("xla",), "cpu": ("gloo",)}


def platform() -> str:
    """What the devices of this process are: "gpu", "tpu" or "cpu"."""
    return jax.local_devices()[0].platform


def backend() -> str:
    """What the devices of this machine talk by, in PyTorch's words."""
    return BACKENDS.get(platform(), ("xla",))[0]


def check_backend(name: Any, argument: str) -> None:
    """Raise for a backend that is unknown, or is not that of this machine's devices; None is whichever is."""
    _check(name, argument, BACKENDS, "talk by")


def check_kind(kind: Any, argument: str) -> None:
    """Raise for a kind of device that is unknown, or is not that of this machine's."""
    _check(kind, argument, KINDS, "are called")


def check_local(number: Any, argument: str) -> None:
    """Raise unless `number` is that of one of this process's devices, or of this process among its host's."""
    from tbjax.hosts import this_job

    own = this_job().local_process
    known = {*range(len(jax.local_devices())), *([] if own is None else [own])}
    if isinstance(number, bool) or number not in known:
        raise ValueError(
            f"{argument}={number!r}: this process drives {len(jax.local_devices())} devices, numbered from 0"
            + (f", and is number {own} of its host." if own else ".")
        )


def device(name: Any) -> Any:
    """The device that is meant: one of JAX's, or a text such as "cuda:1", the one with that number."""
    if not isinstance(name, str):
        return name
    found = re.fullmatch(r"([a-z]+)(?::(\d+))?", name)
    if found is None:
        raise ValueError(f"device={name!r}: a device of JAX's, or a text such as 'cuda:1', is needed.")
    check_kind(found[1], "device")
    if int(found[2] or 0) >= len(jax.devices()):
        raise ValueError(f"device={name!r}: there are {len(jax.devices())} devices, numbered from 0.")
    return jax.devices()[int(found[2] or 0)]


def _check(name: Any, argument: str, table: dict[str, tuple[str, ...]], verb: str) -> None:
    if name is None:
        return
    known = [each for names in table.values() for each in names]
    if name not in known:
        raise ValueError(f"{argument}={name!r} is unknown: it is one of {', '.join(known)}.")
    here = platform()
    if here != "cpu" and name not in table.get(here, known):
        raise ValueError(
            f"{argument}={name!r}, but this machine's devices are {jax.local_devices()[0].device_kind}, which {verb} "
            f"{' or '.join(table[here])}."
        )
