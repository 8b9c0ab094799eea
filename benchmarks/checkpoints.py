"""The checkpoints that the benchmarks load, written once into a folder.

python -m benchmarks.checkpoints FOLDER synthetic smollm2
"""

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # comes inside a package: see `interop.source`

# The sizes of TinyLlama-1.1B: an ordinary Llama whose weights fit a small machine several times.
SYNTHETIC: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def synthetic(folder: Path, config_json: dict[str, Any] | None = None, max_shard_bytes: int | None = None) -> None:
    """A llama of random bfloat16 weights (or of another Hugging Face config), written tensor by tensor."""
    from interop.bindings import bindings, source_shapes
    from interop.export import MAX_SHARD_BYTES, plan_shards
    from interop.families import Fields, family
    from interop.source import normalize_config
    from interop.writer import CheckpointWriter
    from tbjax.api import abstract

    config_json = config_json or SYNTHETIC
    values = normalize_config(dict(config_json))
    translation = family(values["model_type"])
    config = translation.config(Fields(values))
    dtype = np.dtype(getattr(ml_dtypes, config.dtype, config.dtype))
    shapes = source_shapes(bindings(abstract(config, (1, 1, -1)), config, translation))
    layout = {name: (dtype, shape) for name, shape in shapes.items()}
    # One stretch of noise serves every tensor, from another place each time: drawing all of it would take a minute.
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(2 * max(map(math.prod, shapes.values())), dtype=np.float32)).astype(dtype)
    with CheckpointWriter(folder, overwrite=True) as writer:
        writer.begin()
        for file, names in plan_shards(layout, max_shard_bytes or MAX_SHARD_BYTES).items():
            writer.open(file, {name: layout[name] for name in names})
            for name in names:
                size = math.prod(shapes[name])
                start = rng.integers(noise.size - size)
                writer.write(noise[start : start + size])
            writer.close()
        writer.finish({"config.json": config_json})
        if writer.error is not None:
            raise writer.error


def smollm2(folder: Path) -> None:
    """SmolLM2 in float32 in the three formats: `safetensors/`, `bin/` and `gguf/`."""
    import torch

    import tbjax
    from interop.readers import open_checkpoint
    from interop.source import resolve

    source = resolve(SMOLLM2)
    (folder / "gguf").mkdir(parents=True)
    (folder / "gguf" / source.weights.name).symlink_to(source.weights)
    model = tbjax.load(SMOLLM2, dtype="float32", progress=False)
    model.save_pretrained(folder / "safetensors")
    for path in (folder / "safetensors").iterdir():
        # A tokenizer takes its own time to load, which differs between contenders and is no weight.
        if "token" in path.name or path.suffix == ".jinja" or path.name in ("merges.txt", "vocab.json"):
            path.unlink()
    (folder / "bin").mkdir()
    (folder / "bin" / "config.json").write_text((folder / "safetensors" / "config.json").read_text())
    with open_checkpoint(folder / "safetensors") as checkpoint:
        tensors = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in checkpoint.items()}
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", choices=["synthetic", "smollm2"])
    arguments = parser.parse_args()
    for name in arguments.models:
        with contextlib.suppress(FileExistsError):
            (arguments.folder / name).parent.mkdir(parents=True)
        {"synthetic": synthetic, "smollm2": smollm2}[name](arguments.folder / name)


if __name__ == "__main__":
    main()
