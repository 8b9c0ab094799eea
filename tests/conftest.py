"""What every test runs on: eight virtual CPU devices, and no network.

JAX reads these variables once, when it is first imported, so they are set at the top of this file, before any test
module is collected. A test that needs another number of devices starts a process of its own.
"""

import os

from hypothesis import settings

from tests.xla import flags

DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags(DEVICES)}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network fails at once, and says so
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and xdist's processes share the same few cores

# No compilation cache: XLA's CPU programs that come from it may run what they send in another order than those just
# compiled, and a zero-bubble pipeline then waits for ever.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# The same examples in every run: whether a change may land is no matter of luck. HYPOTHESIS_PROFILE=default draws
# others.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
