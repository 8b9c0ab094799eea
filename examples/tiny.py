"""Small models with random weights for the examples' --tiny: the shape of the large one, on eight virtual CPU devices.

Their configs are Hugging Face configs, so a folder that `written` makes is a checkpoint like any other.
"""

import argparse
from pathlib import Path
from typing import Any

DEVICES = 8

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}

MIXTRAL: dict[str, Any] = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}

FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
    "max_position_embeddings": 1024,
}


def parser(page: str | None, model_name: str) -> argparse.ArgumentParser:
    """The flags that every example has; `page` is its docstring."""
    made = argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model-name", "--model_name", default=model_name, help="hub id or folder; to plan, any name")
    made.add_argument("--tiny", action="store_true", help="a small model of random weights, to see it run")
    return made


def provide_devices() -> None:
    """Eight devices of the CPU; to be called before JAX starts. Changes nothing where there is an accelerator."""
    from tbjax.terminal import provide_cpu_devices

    provide_cpu_devices((DEVICES, 1, 1))


def written(config: dict[str, Any], folder: str | Path) -> str:
    """`folder`, with a checkpoint of that config in it: safetensors and a config.json."""
    import tbjax

    tbjax.from_config(config, dtype="float32").save_pretrained(folder)
    return str(folder)
