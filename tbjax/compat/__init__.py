"""Names under which other libraries' documents know what tbjax does, thin, over the real API.

    pipeline    PipelineParallelConfig, PipelineStage, create_pipeline_stages, GPipeScheduler, InterleavedScheduler,
                estimate_pipeline_memory

A snippet from there runs with its import line changed, on a model of ours.
"""

from tbjax.compat.pipeline import (
    GPipeScheduler,
    InterleavedScheduler,
    PipelineParallelConfig,
    PipelineStage,
    create_pipeline_stages,
    estimate_pipeline_memory,
    split_batch,
)

__all__ = [
    "GPipeScheduler",
    "InterleavedScheduler",
    "PipelineParallelConfig",
    "PipelineStage",
    "create_pipeline_stages",
    "estimate_pipeline_memory",
    "split_batch",
]
