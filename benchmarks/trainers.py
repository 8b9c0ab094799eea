"""The ways to train SmolLM2 that `benchmarks.train` compares. Each runs alone in a fresh process:

    python -m benchmarks.trainers tbjax --rows 4 --sequence 512 --steps 6 --remat none

and prints one line of JSON. All learn from the same rows in the same order, in float32, with the same AdamW (norms do
not decay), the same clipping and the same rates. The first steps, in which programs are compiled and memory is asked
for, count towards memory and not towards time.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.checkpoints import SMOLLM2
from benchmarks.memory import AnonymousMemory

# What is computed again in the backward pass, by our policies of these names. "cheap" keeps what the matmuls gave that
# is wide or that others need, and computes again what costs little: norms, rotations, activation functions, and what
# attention adds to the residual stream. PyTorch knows none and full, and keeps everything beside the others.
REMATS: Mapping[str, str] = {
    "none": "none",
    "dots": "dots",
    "cheap": "save(query,key,value,attended,gate,up)",
    "full": "full",
}

SETTLING = 2  # steps that are not timed
SETTINGS = {"learning_rate": 3e-5, "warmup": 2, "weight_decay": 0.1, "clip_norm": 1.0}
BETAS = 0.9, 0.95  # as `tbjax.training.optimizer` has them


class Task(NamedTuple):
    """What to train on, and how."""

    tokens: Sequence[np.ndarray]  # for each step [B, S + 1]
    remat: str  # what is computed again in the backward pass
    threads: int


class Trained(NamedTuple):
    """What came of it."""

    losses: list[float]
    seconds: list[float]  # of each step
    processor_seconds: list[float]  # the same as the system's scheduler counts them, all threads together


def tbjax(task: Task) -> Trained:
    import tbjax as library
    from tbjax.training import Batch
    from tbjax.training.loop import train

    model = library.load(SMOLLM2, (1, 1, 1), dtype="float32", progress=False)
    times = []

    # A step begins when its batch is fetched: on a CPU the one before it has then been computed.
    def batches() -> Iterator[Batch]:
        for rows in task.tokens:
            times.append(now())
            yield Batch(rows[:, :-1], rows[:, 1:])

    config = settings(len(task.tokens), REMATS[task.remat])
    result = train(model, batches(), config, progress=False)
    times.append(now())
    return Trained(result.losses, *np.diff(times, axis=0).T.tolist())


def transformers(task: Task) -> Trained:
    import torch
    import transformers as library

    from interop.source import resolve

    torch.set_num_threads(task.threads)
    weights = resolve(SMOLLM2).weights
    model = library.AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    if task.remat == "full":
        model.gradient_checkpointing_enable()
    config = settings(len(task.tokens), "none")
    return torch_training(model, task.tokens, [config.rate(step) or 0.0 for step in range(1, config.steps + 1)])


def torch_training(model: Any, tokens: Sequence[np.ndarray], rates: Sequence[float]) -> Trained:
    """The loop as it is written by hand: forward, backward, clip, step."""
    import torch

    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    losses, times = [], [now()]
    for rows, rate in zip(tokens, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.from_numpy(rows.astype(np.int64))
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(now())
        del logits, loss
    return Trained(losses, *np.diff(times, axis=0).T.tolist())


def now() -> tuple[float, float]:
    """Seconds of the clock, and of the processors in this process."""
    return time.perf_counter(), time.process_time()


CONTENDERS: dict[str, Callable[[Task], Trained]] = {function.__name__: function for function in (tbjax, transformers)}


def settings(steps: int, remat: str) -> Any:
    """The configuration of our run; its rates are everyone's."""
    from tbjax.training.config import TrainConfig

    return TrainConfig(steps=steps, precision="float32", remat=remat, log_every=1, **SETTINGS)


def corpus_rows(tokenizer: Any, steps: int, rows: int, sequence: int, seed: int = 0) -> list[np.ndarray]:
    """For each step [rows, sequence + 1] tokens of the reference that Python's help() shows, drawn by `seed`."""
    from tbjax.training.data import python_topics

    ids = np.concatenate([tokenizer(chapter)["input_ids"] for chapter in python_topics()]).astype(np.int32)
    starts = np.random.default_rng(seed).integers(0, ids.size - sequence - 1, (steps, rows))
    return [ids[step[:, None] + np.arange(sequence + 1)] for step in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--remat", choices=REMATS, default="none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if arguments.steps <= SETTLING:
        parser.error(f"--steps {arguments.steps}: the first {SETTLING} are not timed, so more are needed.")
    from interop.source import resolve

    tokenizer = resolve(SMOLLM2).tokenizer
    if tokenizer is None:
        raise SystemExit(f"{SMOLLM2} has no tokenizer here.")
    tokens = corpus_rows(tokenizer.value, arguments.steps, arguments.rows, arguments.sequence)
    with AnonymousMemory() as memory:
        trained = CONTENDERS[arguments.contender](Task(tokens, arguments.remat, arguments.threads))
    tokens_a_step = arguments.rows * arguments.sequence
    result = {
        "tokens_per_second": tokens_a_step / statistics.median(trained.seconds[SETTLING:]),
        "tokens_per_processor_second": tokens_a_step / statistics.median(trained.processor_seconds[SETTLING:]),
        "peak_bytes": memory.peak,
        "losses": trained.losses,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
