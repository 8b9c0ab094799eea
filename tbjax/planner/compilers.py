"""The vendors' compilers: where they are installed, how they get there, and what they are asked to compile for.

libtpu compiles for TPUs and XLA's CUDA plugin for NVIDIA GPUs, both without the device. `pip install "tbjax[verify]"`
brings them, but to where every JAX program of the environment finds them: on a machine without a GPU each `import jax`
then complains that there is none. So tbjax also looks into a folder of its own,

    python -m tbjax.planner.compilers            # installs both compilers there, 2 GB

which only the process that compiles (`tbjax.planner.compile`) has on its path: nothing else sees them.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from packaging.requirements import Requirement

from tbjax.planner.hardware import Cluster

Compiler: TypeAlias = Literal["tpu", "cuda", "cpu"]

FOLDER = Path(sys.prefix) / "compilers"

# What each compiler is found by: a module of it.
_MODULES: Mapping[str, str] = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}
_VENDORS: Mapping[str, Compiler] = {"nvidia": "cuda", "google": "tpu", "cpu": "cpu"}


def compiler_for(cluster: Cluster, asked: str = "auto") -> Compiler:
    """The compiler that makes programs for `cluster`, or the one that was asked for."""
    if asked not in ("auto", *get_args(Compiler)):
        known = ", ".join(map(repr, ("auto", *get_args(Compiler))))
        raise ValueError(f"compiler={asked!r} is unknown: tbjax knows {known}.")
    own = _VENDORS[cluster.hardware.vendor]
    if asked in ("auto", own):
        return own
    if asked != "cpu":
        raise ValueError(f"compiler={asked!r} does not compile for {cluster}: {own!r} does, and 'cpu' stands in.")
    return "cpu"


def require(compiler: Compiler) -> None:
    """Raises, with what to install, where a compiler is missing."""
    if not installed(compiler):
        raise ModuleNotFoundError(
            f"the {compiler!r} compiler is not installed: run `python -m tbjax.planner.compilers`, which keeps both "
            "compilers out of other programs' way, or `pip install 'tbjax[verify]'`. compiler='cpu' needs neither."
        )


def installed(compiler: Compiler) -> bool:
    """Whether a compiler is there, in the folder or in the environment."""
    module = _MODULES.get(compiler)
    return module is None or (FOLDER / module).is_dir() or importlib.util.find_spec(module) is not None


def environment(compiler: Compiler, devices: int) -> dict[str, str]:
    """The environment of a process that compiles: this one's, without what would reach its JAX."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_", "TPU_", "LIBTPU_", "PJRT_"))
    }
    path = [str(FOLDER)] if compiler != "cpu" and FOLDER.is_dir() else []
    return kept | {
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",  # the process itself runs nothing, wherever it compiles for
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if compiler == "cpu" else "",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache would say nothing of its memory
        "TPU_SKIP_MDS_QUERY": "1",  # the metadata server of a TPU machine, which this is not
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no device, so several processes may
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def gpu_target(cluster: Cluster) -> str:
    """The text of the `GpuTargetConfigProto` that tells XLA which GPU to compile for."""
    figures = dict(cluster.hardware.target)
    if not figures:
        raise ValueError(
            f"the record of {cluster.hardware.name!r} does not say what XLA must know of it: give Hardware(target=...) "
            "the fields of GpuDeviceInfoProto, as those of the catalogue have it."
        )
    capability = ("major", "minor", "feature_extension")
    described = {"name", *capability}
    lines = [f"  {field}: {_literal(value)}" for field, value in figures.items() if field not in described]
    chip = " ".join(f"{field}: {figures[field]}" for field in capability if field in figures)
    version = " ".join(f"{field}: {number}" for field, number in _CUDNN.items())
    name = _literal(figures.get("name", cluster.hardware.title))
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ {chip} }}",
            f"  name: {name}",
            '  device_vendor: "NVIDIA Corporation"',
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {version} }}",
            f"device_description_str: {name}",
        ]
    )


# The oldest cuDNN that JAX's CUDA plugin runs with is 9.8; XLA picks among its fused attentions by this number.
_CUDNN = {"major": 9, "minor": 8, "patch": 0}


def _literal(value: int | float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def requirements() -> list[str]:
    """What the extra `verify` asks for and the environment lacks, in the releases that fit the JAX that it has."""
    found: dict[str, Requirement] = {}
    for requirement in _of_extra("tbjax", "verify"):
        parts = [part for extra in requirement.extras for part in _of_extra(requirement.name, extra)]
        found |= {part.name: part for part in parts or [requirement] if not _is_there(part.name)}
    if plugin := found.get("jax-cuda12-plugin"):  # with --no-deps it does not bring its other half
        found["jax-cuda12-pjrt"] = Requirement(f"jax-cuda12-pjrt{plugin.specifier}")
    return [f"{name}{requirement.specifier}" for name, requirement in found.items()]


def _of_extra(package: str, extra: str) -> list[Requirement]:
    listed = map(Requirement, importlib.metadata.requires(package) or ())
    return [
        r for r in listed if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def _is_there(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(arguments: Sequence[str] = ()) -> None:
    """Install both compilers into the folder. `arguments` go to pip, such as `--constraint constraints.txt`.

    Without their dependencies, which are libraries that only running on a GPU takes: several gigabytes.
    """
    wanted = requirements()
    if not wanted:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER)]
    subprocess.run([*pip, *arguments, *wanted], check=True)


if __name__ == "__main__":
    install(sys.argv[1:])
