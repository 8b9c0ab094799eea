"""How the tests have XLA compile for the CPU: quickly, since what they compile runs for a moment.

LLVM leaves out what makes code fast and compiling slow, and loops are written by the older emitters; a small model's
training step compiles in a third of the time. Neither changes what is computed, sent or allocated between devices: the
passes over the program are those of any other run. An unknown flag ends the process, so each is for the releases of
jaxlib known to have it.
"""

from importlib.metadata import version

_QUICK = {
    "--xla_backend_optimization_level=0": ("0.10.", "0.11.", "0.12."),
    "--xla_llvm_disable_expensive_passes=true": ("0.10.", "0.11.", "0.12."),
    "--xla_cpu_use_fusion_emitters=false": ("0.10.",),
}


def flags(devices: int) -> str:
    """XLA_FLAGS for a process with so many CPU devices."""
    jaxlib = version("jaxlib")
    quick = [flag for flag, releases in _QUICK.items() if jaxlib.startswith(releases)]
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
