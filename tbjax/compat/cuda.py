"""`torch.cuda`, as far as training scripts ask it: the accelerators of this process, whatever their make."""

import jax

from tbjax.compat import devices


def is_available() -> bool:
    return devices.platform() != "cpu"


def device_count() -> int:
    return len(jax.local_devices())


def current_device() -> int:
    """The first: a program is for all of them."""
    return 0


def set_device(device: int) -> None:
    """JAX uses all devices of its process: `device` must be one of them, or this process's number on its host."""
    devices.check_local(device, "device")


def memory_allocated(device: int = 0) -> int:
    """Bytes of arrays on a device."""
    return _bytes(device, "bytes_in_use")


def memory_reserved(device: int = 0) -> int:
    """Bytes that the allocator holds on a device."""
    return _bytes(device, "pool_bytes", "bytes_reserved", "bytes_in_use")


def _bytes(number: int, *names: str) -> int:
    """The first of these figures that the device gives."""
    if number not in range(device_count()):
        raise ValueError(f"device={number!r}: this process drives {device_count()} devices, numbered from 0.")
    device = jax.local_devices()[number]
    figures = device.memory_stats()
    if figures is None:  # CPUs keep no count
        held = (shard.data for array in jax.live_arrays() for shard in array.addressable_shards)
        return sum(array.nbytes for array in held if array.device == device)
    return next(int(figures[name]) for name in names if name in figures)
