"""Fine-tune a Llama over all devices with FSDP, with the flags that PyTorch's examples of the same have.

    python examples/train_llama_7b_fsdp.py --tiny                      # a small model of random weights; no network
    python examples/train_llama_7b_fsdp.py --mixed_precision --activation_checkpointing --data corpus.jsonl
    torchrun --nproc_per_node=8 --nnodes=2 ... examples/train_llama_7b_fsdp.py --sharding_strategy HYBRID_SHARD

JAX needs no launcher on one machine: a process drives all of its devices. Under torchrun each process takes one. Where
there are no accelerators, eight virtual CPU devices stand in. The text is the reference that Python's help() shows,
unless --data names another.
"""

import argparse
import math
import os
import sys

import tiny

# A Llama that learns to spell in a minute on a CPU: its tokens are bytes.
TINY = tiny.LLAMA | {"tie_word_embeddings": True}


def main() -> int:
    arguments = parse_arguments()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        tiny.provide_devices()

    import jax
    import numpy as np

    import tbjax

    tbjax.initialize()  # where a launcher started several processes, they are one JAX program now

    from tbjax.training import data
    from tbjax.training.config import TrainConfig

    devices = jax.device_count()
    # HYBRID_SHARD shards within a node and replicates between nodes, over the slower links.
    nodes = processes // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes > 1 else jax.process_count()
    groups = nodes if arguments.sharding_strategy == "HYBRID_SHARD" else 1
    layout = {"mesh": (groups, devices // groups, 1), "sharding": arguments.sharding_strategy}
    batch_size = arguments.batch_size * arguments.gradient_accumulation_steps * devices
    rows = {"seq_len": arguments.seq_len, "batch_size": batch_size, "seed": arguments.seed}
    if arguments.tiny:
        model = tbjax.from_config(TINY, dtype="float32", seed=arguments.seed, **layout)
        chapters = [np.frombuffer(chapter.encode(), np.uint8) for chapter in data.python_topics()]
        dataset = data.tokens(chapters, vocabulary=TINY["vocab_size"], **rows)
    else:
        model = tbjax.load(arguments.model_name, dtype="float32", **layout)
        dataset = data.load(arguments.data or data.python_topics(), model.tokenizer, **rows)
    learned, held_out = dataset.hold_out(0.05)
    config = TrainConfig(
        steps=arguments.steps,
        optimizer="adamw",
        learning_rate=arguments.learning_rate or (3e-3 if arguments.tiny else 1e-5),
        warmup=min(10, arguments.steps // 2),
        precision="mixed" if arguments.mixed_precision else "float32",
        remat="full" if arguments.activation_checkpointing else "none",
        microbatches=arguments.gradient_accumulation_steps,
        eval_batches=4,
        log_every=max(1, arguments.steps // 10),
        seed=arguments.seed,
    )

    def show(record: "tbjax.training.metrics.Record") -> None:
        speed = "" if record.tokens_per_second is None else f", {record.tokens_per_second:,.0f} tokens/s"
        if jax.process_index() == 0:
            print(f"step {record.step}: loss {record.loss:.4f}{speed}", flush=True)

    result = tbjax.train(
        model, learned, config, eval_data=held_out, checkpoint_dir=arguments.checkpoint_dir, on_record=show
    )
    evaluation = result.evaluations[result.step]
    if jax.process_index() == 0:
        print(f"{result.step} steps on {devices} devices: held-out perplexity {evaluation.perplexity:.3g}")
    if arguments.output_dir:
        model.save_pretrained(arguments.output_dir)
    return 0 if math.isfinite(evaluation.loss) else 1


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "meta-llama/Llama-2-7b-hf")
    parser.add_argument("--data", help="text to learn from: a file, a folder, a data set on the hub")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences on each device at a time")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--mixed_precision", action="store_true", help="bfloat16 matmuls, float32 weights")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument(
        "--sharding_strategy",
        default="FULL_SHARD",
        choices=["NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"],
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint_dir", help="where the run is saved, and goes on from")
    parser.add_argument("--output_dir", help="where the trained model is written, as safetensors")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
