"""Checkpoints of every format behind one face: names, shapes, dtypes, and rectangles of bytes."""

from interop.readers.base import Checkpoint, CheckpointError, SourceTensor
from interop.readers.memory import MemoryCheckpoint
from interop.readers.open import open_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "MemoryCheckpoint", "SourceTensor", "open_checkpoint"]
