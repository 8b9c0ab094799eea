"""What every test runs on: eight virtual CPU devices, no network, and a compilation cache that outlives the run.

JAX reads these variables once, when it is first imported, so they are set at the top of this file, before any test
module is collected. A test that needs another number of devices starts a process of its own.
"""

import os
from pathlib import Path

from tests.xla import flags

DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags(DEVICES)}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network fails at once, and says so
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and xdist's processes share the same few cores

# Compiling is most of what the tests spend: whatever took a fifth of a second is kept for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
