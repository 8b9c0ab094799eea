"""transformers, for configs and tokenizers: it needs no PyTorch for them, and advises to install it all the same.

Whoever installs tbjax alone would read that no models are available before anything else. So it is imported here, with
that advice left out; where a user has imported it before, it has been given.
"""

import importlib
import os
from typing import Any

_SILENCE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def transformers() -> Any:
    """The package."""
    before = os.environ.get(_SILENCE)
    os.environ[_SILENCE] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[_SILENCE]
        else:
            os.environ[_SILENCE] = before
