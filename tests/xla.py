"""How the tests have XLA compile for the CPU: quickly, since what they compile runs for a moment.

LLVM leaves out what makes code fast and compiling slow, and loops are written by the older emitters; a small model's
training step compiles in a third of the time. Neither changes what is computed, sent or allocated between devices: the
passes over the program are those of any other run. An unknown flag ends the process, so they are for the jaxlib known
to have them.
"""

from importlib.metadata import version

_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)


def flags(devices: int) -> str:
    """XLA_FLAGS for a process with so many CPU devices."""
    quick = _QUICK if version("jaxlib").startswith("0.10.") else ()
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
