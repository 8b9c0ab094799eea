"""Many hosts: the processes of a job find each other, whatever started them, and become one JAX program.

Names are imported when first asked for: a command asks who it is before JAX may be imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbjax.hosts.joining import Hosts, initialize, leave
    from tbjax.hosts.launchers import Contradiction, Job, recognise, this_job
    from tbjax.hosts.meeting import NotMet

_HOMES = {
    "Contradiction": "launchers",
    "Hosts": "joining",
    "Job": "launchers",
    "NotMet": "meeting",
    "initialize": "joining",
    "leave": "joining",
    "recognise": "launchers",
    "this_job": "launchers",
}

__all__ = ["Contradiction", "Hosts", "Job", "NotMet", "initialize", "leave", "recognise", "this_job"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tbjax.hosts.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tbjax.hosts' has no attribute {name!r}")
