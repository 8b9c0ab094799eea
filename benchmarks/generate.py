"""Generation beside transformers, on the CPU: SmolLM2 in float32 and bfloat16.

    python -m benchmarks.generate                        both dtypes, batches of 1, 8 and 32
    python -m benchmarks.generate --dtype float32 --batch 1 --rounds 5

The contenders write the same prompts greedily, by turns, in one process, so that whatever else the machine does falls
on both; of the rounds the medians are reported. Each round times an answer of one token (the time to the first) and one
of many, and the rate of decoding is that of the tokens between. Programs are compiled and caches are filled by a round
that does not count.

`of limit` is what decoding a single row reaches of the machine's memory bandwidth: the bytes of the weights and of the
keys and values that a token needs, once each, over the time it takes, as a share of the rate at which the process reads
memory by a sum or a matrix-vector product, the faster of the two. The rate is measured before each answer and is a
median as the others are: a machine that shares its host reads at 30 GB/s for most of a minute and at 55 now and then,
and the best of these says nothing of the time in which tokens were written. Both ends of its range are printed too.

With --json the figures follow as a line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.checkpoints import SMOLLM2

PROMPT = 128
NEW = 64
BATCHES = (1, 8, 32)
ROUNDS = 3
READ_BYTES = 400_000_000  # far beyond any cache
READINGS = 3  # before each answer, by each way; the first is slow where threads have to wake

# What the project asks of itself: times transformers' rate by batch, the share of the bandwidth, the time to the first.
ASKED = {1: 2.0, 8: 1.5, 32: 1.5}
ASKED_OF_LIMIT = 0.6


class Contender(NamedTuple):
    """Writes so many tokens after each prompt."""

    name: str
    write: Callable[[np.ndarray, int], Any]


def ours(folder: str, dtype: str) -> tuple[Contender, float]:
    """tbjax on one device, and the bytes of its weights."""
    import jax

    import tbjax

    model = tbjax.load(folder, (1, 1, 1), dtype=dtype, progress=False)
    options: dict[str, Any] = {"eos_token_id": [], "do_sample": False}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return Contender("tbjax", lambda prompts, new: model.generate(prompts, max_new_tokens=new, **options)), weights


def theirs(folder: str, dtype: str) -> Contender:
    """transformers, as it comes."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    def write(prompts: np.ndarray, new: int) -> Any:
        ids = torch.from_numpy(prompts)
        options: dict[str, Any] = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, prompts.shape[1] :].tolist()

    return Contender("transformers", write)


class Reader:
    """How fast the process reads memory."""

    def __init__(self) -> None:
        import jax
        import torch

        side = 2048
        table = np.ones((READ_BYTES // 4 // side, side), np.float32)
        self.bytes = table.nbytes
        self.torch = torch.from_numpy(table)
        self.jax = jax.device_put(table, jax.devices()[0])
        self.product = jax.jit(lambda table, x: table @ x)
        self.x = jax.numpy.ones(side)

    def measure(self) -> float:
        """Bytes a second, by the faster of the ways."""
        best = 0.0
        for read in (lambda: self.torch.sum(), lambda: self.product(self.jax, self.x).block_until_ready()):
            for _ in range(READINGS):
                start = time.perf_counter()
                read()
                best = max(best, self.bytes / (time.perf_counter() - start))
        return best


def measure(dtype: str, batches: list[int], rounds: int, new: int, reader: Reader) -> list[dict[str, Any]]:
    """The figures of one dtype, a row for each batch."""
    import tbjax

    with tempfile.TemporaryDirectory() as folder:
        tbjax.load(SMOLLM2, (1, 1, 1), dtype=dtype, progress=False).save_pretrained(folder, overwrite=True)
        mine, weights = ours(folder, dtype)
        contenders = [mine, theirs(folder, dtype)]
    rows = []
    for batch in batches:
        prompts = np.random.default_rng(batch).integers(5, 49_000, (batch, PROMPT))
        seconds: dict[tuple[str, int], list[float]] = {(c.name, n): [] for c in contenders for n in (1, new)}
        processor: dict[tuple[str, int], list[float]] = {key: [] for key in seconds}
        bandwidth: list[float] = []
        for number in range(rounds + 1):
            for contender in contenders if number % 2 else contenders[::-1]:
                for count in (1, new):
                    read = reader.measure()
                    start, of_processor = time.perf_counter(), time.process_time()
                    contender.write(prompts, count)
                    if number:
                        bandwidth.append(read)
                        seconds[contender.name, count].append(time.perf_counter() - start)
                        processor[contender.name, count].append(time.process_time() - of_processor)
        rows.append(_row(dtype, batch, new, seconds, processor))
        rows[-1] |= {"weights": weights, "bandwidth": statistics.median(bandwidth), "bandwidths": bandwidth}
        _print(rows[-1])
    return rows


def _row(dtype: str, batch: int, new: int, seconds: Any, processor: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"dtype": dtype, "batch": batch}
    for name in ("tbjax", "transformers"):
        first, whole = (statistics.median(seconds[name, count]) for count in (1, new))
        row[f"{name}_first"] = first
        row[f"{name}_rate"] = batch * (new - 1) / (whole - first)
        first, whole = (statistics.median(processor[name, count]) for count in (1, new))
        row[f"{name}_processor"] = (whole - first) / (new - 1)
    row["times"] = row["tbjax_rate"] / row["transformers_rate"]
    row["times_first"] = row["transformers_first"] / row["tbjax_first"]
    # Keys and values of all 30 layers, 3 heads of 64, at the middle of the answer.
    row["cache"] = batch * 2 * 30 * 3 * 64 * (PROMPT + new / 2) * (4 if dtype == "float32" else 2)
    return row


def _print(row: dict[str, Any]) -> None:
    row["of_limit"] = share = (row["weights"] + row["cache"]) * row["tbjax_rate"] / row["batch"] / row["bandwidth"]
    print(
        f"{row['dtype']:9} batch {row['batch']:2}: tbjax {row['tbjax_rate']:6.1f} tokens/s, "
        f"transformers {row['transformers_rate']:6.1f}, {row['times']:.2f} x (asked {ASKED.get(row['batch'], 1):.1f}); "
        f"first token {row['tbjax_first']:.2f} s, {row['transformers_first']:.2f} s, {row['times_first']:.2f} x; "
        f"processor {1e3 * row['tbjax_processor']:.0f} and {1e3 * row['transformers_processor']:.0f} ms a step; "
        f"{100 * share:.0f} % of {row['bandwidth'] / 1e9:.1f} GB/s ({min(row['bandwidths']) / 1e9:.0f} to "
        f"{max(row['bandwidths']) / 1e9:.0f}; asked {100 * ASKED_OF_LIMIT:.0f} at batch 1)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--new", type=int, default=NEW, help="tokens of the longer answer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    reader, rows = Reader(), []
    for dtype in arguments.dtype or ["float32", "bfloat16"]:
        batches: list[int] = arguments.batch or list(BATCHES)
        rows += measure(dtype, batches, arguments.rounds, arguments.new, reader)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
