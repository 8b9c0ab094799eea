"""Many hosts: the processes of a job find each other, whatever started them, and become one JAX program."""

from tbjax.hosts.initialize import Hosts, initialize, launched, leave
from tbjax.hosts.launchers import Contradiction, Job, recognise
from tbjax.hosts.meeting import NotMet

__all__ = ["Contradiction", "Hosts", "Job", "NotMet", "initialize", "launched", "leave", "recognise"]
