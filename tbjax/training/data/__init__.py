"""Data for training: from files, the Hugging Face hub or arrays to batches, the same for any number of processes.

Records (`sources`) become documents of token ids (`text`, `encoder`, `chat`), which lie one behind the other
(`corpus`); a plan says which of them share a row (`packing`), and rows make batches (`dataset`).
"""

from tbjax.training.data.constructors import (
    arrow,
    hugging_face,
    jsonl,
    load,
    parquet,
    python_topics,
    records,
    text,
    tokens,
    write_tokens,
)
from tbjax.training.data.dataset import Dataset, Evaluation, Options
from tbjax.training.data.sources import BadRecord

__all__ = [
    "BadRecord",
    "Dataset",
    "Evaluation",
    "Options",
    "arrow",
    "hugging_face",
    "jsonl",
    "load",
    "parquet",
    "python_topics",
    "records",
    "text",
    "tokens",
    "write_tokens",
]
