"""The documents' snippets in PyTorch's own words run as they stand there, with another import line and small models."""

import copy
import os
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch as pytorch

import tbjax
from tbjax import compat
from tbjax.collectives import Peers
from tbjax.compat import devices, distributed, torch
from tbjax.model import Block
from tbjax.sharding import by_path
from tbjax.training.compression import TopK
from tests import tiny
from tests.pipeline.models import DENSE

# Of "Distributed Training", sections "Quick Start" and "Data Parallel (DDP)".
REPLICATED = """
# Initialize process group (launched via torchrun)
dist.init_process_group("nccl")
local_rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(local_rank)

model = YourModel().to(local_rank)
model = DDP(model, device_ids=[local_rank], find_unused_parameters=False)
"""

# Its section "Memory Estimation".
COUNTED = """
# Quick parameter-count-based estimate
param_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
optimizer_bytes = param_bytes * 2  # Adam stores 2 states per param
print(f"Model: {param_bytes / 1e9:.1f} GB")
print(f"Optimizer: {optimizer_bytes / 1e9:.1f} GB")
"""

# Of the guide, section "FSDP".
TRAINED = """
# Initialize distributed
dist.init_process_group("nccl")

# Configure mixed precision
mp_policy = MixedPrecision(
    param_dtype=torch.bfloat16,
    reduce_dtype=torch.bfloat16,
)

# Wrap model with FSDP
model = FSDP(
    model,
    sharding_strategy=ShardingStrategy.FULL_SHARD,
    mixed_precision=mp_policy,
    device_id=torch.cuda.current_device(),
)

# Training is standard after wrapping
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for batch in dataloader:
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

# Its sections "Activation Checkpointing" and "CPU Offloading".
CHECKPOINTED = """
# Apply to transformer layers
apply_activation_checkpointing(
    model,
    check_fn=lambda m: isinstance(m, TransformerLayer),
)
"""

OFFLOADED = """
model = FSDP(
    model,
    cpu_offload=CPUOffload(offload_params=True),
)
"""

# Its sections "Check Memory Usage" and "Verify Distribution".
CHECKED = """
def print_memory_stats():
    if torch.cuda.is_available():
        allocated = torch.cuda.memory_allocated() / 1e9
        reserved = torch.cuda.memory_reserved() / 1e9
        print(f"Allocated: {allocated:.2f} GB, Reserved: {reserved:.2f} GB")

def check_distributed():
    if dist.is_initialized():
        print(f"Rank: {dist.get_rank()}/{dist.get_world_size()}")
        print(f"Backend: {dist.get_backend()}")
"""

# Of VIBEE's guide, section "FSDP (PyTorch Native)".
WRAPPED = """
# Wrap model
model = FSDP(
    model,
    sharding_strategy=ShardingStrategy.FULL_SHARD,  # ZeRO-3
    mixed_precision=MixedPrecision(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.bfloat16,
        buffer_dtype=torch.bfloat16,
    ),
    device_id=torch.cuda.current_device(),
    use_orig_params=True,  # For torch.compile
)
"""

# Its section "Checkpointing Strategy".
STORED = """
# Async checkpointing
def async_checkpoint(model, path):
    state = model.state_dict()
    thread = threading.Thread(
        target=torch.save,
        args=(state, path)
    )
    thread.start()
    return thread

# Sharded checkpointing
save(
    state_dict=model.state_dict(),
    storage_writer=FileSystemWriter(path),
)
"""

# Its section "Gradient Compression", which is about PyTorch's tensors.
COMPRESSED = """
# Top-K compression
def compress_gradient(grad, k=0.01):
    flat = grad.flatten()
    k_elements = int(len(flat) * k)
    values, indices = torch.topk(flat.abs(), k_elements)
    return values, indices

# Random sparsification
def random_sparse(grad, p=0.01):
    mask = torch.rand_like(grad) < p
    return grad * mask / p
"""

IMPORTS = """
from tbjax.compat import distributed as dist, torch
from tbjax.compat import *
from tbjax.compat import DistributedDataParallel as DDP, FullyShardedDataParallel as FSDP
from tbjax.compat.checkpoint import save, load
"""


def run(snippet, imports=IMPORTS, **given):
    """The snippet with the names that it imports, and those that it takes for granted."""
    names = {"os": os, "threading": threading, **given}
    exec(imports + snippet, names)  # noqa: S102 - the text stands above
    return names


def small():
    return tbjax.from_config(DENSE, tbjax.make_mesh({"dp": 1}, jax.devices()[:1]), dtype="float32")


def sizes(model):
    return {axis: size for axis, size in dict(model.mesh.shape).items() if size > 1}


def batches(count, vocabulary):
    generator = np.random.default_rng(0)
    for _ in range(count):
        tokens = generator.integers(3, vocabulary, (8, 16))
        labels = np.where(np.arange(16) < 12, tokens, -100)
        yield {"input_ids": tokens, "labels": labels}


@pytest.fixture(autouse=True)
def _no_group():
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_the_loop_does_what_pytorch_s_does():
    """Losses of three steps, of the same model, in float32 there and here; then as the guide has it, in bfloat16."""
    case = tiny.BY_NAME["llama"]
    theirs, data = copy.deepcopy(tiny.make(case)), [*batches(1, tiny.VOCABULARY)] * 3
    names = {"model": theirs, "dataloader": data}
    exact = TRAINED.replace("bfloat16", "float32").replace("1e-4", "1e-2") + "\n    losses.append(loss.item())\n"
    ours, mixed = run(exact, losses=[], **names), run(TRAINED, **names)
    optimizer, wanted = pytorch.optim.AdamW(theirs.parameters(), lr=1e-2), []
    for batch in data:
        loss = theirs(**{name: pytorch.from_numpy(value) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    np.testing.assert_allclose(ours["losses"], wanted, rtol=1e-5)
    assert wanted[-1] < wanted[0] - 0.1
    model = mixed["model"].module
    assert sizes(model) == {"fsdp": 8}
    assert model.training_defaults.precision == "mixed"
    assert wanted[-1] < mixed["loss"].item() < wanted[0]  # at a hundredth of the rate
    assert mixed["model"].precision.reduce_dtype == "bfloat16"


def test_gradients_add_up_and_losses_are_scaled():
    model = compat.FullyShardedDataParallel(small(), sharding_strategy="SHARD_GRAD_OP")
    (batch,) = batches(1, DENSE.vocab_size)
    loss = model(**batch).loss
    loss.backward()
    once = {parameter.name: np.asarray(parameter.grad) for parameter in model.parameters()}
    assert set(once) == set(by_path(model.module))
    (loss / 4).backward()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, once[name] * 1.25, rtol=1e-5)
    assert (loss / 4).item() == pytest.approx(float(loss) / 4)
    np.testing.assert_allclose(model(batch).logits, model.module(batch["input_ids"]))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"call backward\(\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="a loss needs labels"):
        model(batch["input_ids"]).loss  # noqa: B018
    with pytest.raises(ValueError, match="the batch has 'tokens'"):
        model({"tokens": batch["input_ids"]})
    with pytest.raises(ValueError, match="of 0 wrapped models"):
        torch.optim.AdamW([])


def test_a_replicated_model_lies_on_all_devices(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    found = run(REPLICATED, YourModel=lambda: SimpleNamespace(to=lambda device: small()))
    model = found["model"]
    assert sizes(model.module) == {"dp": 8}
    run(COUNTED, model=model)
    size = sum(array.nbytes for array in jax.tree.leaves(model.module))
    assert capsys.readouterr().out == f"Model: {size / 1e9:.1f} GB\nOptimizer: {2 * size / 1e9:.1f} GB\n"
    assert [parameter.shape for parameter in model.parameters()] == [a.shape for a in jax.tree.leaves(model.module)]
    with pytest.raises(ValueError, match="device_ids=8: this process drives 8 devices"):
        compat.DistributedDataParallel(small(), device_ids=[8])
    with pytest.raises(TypeError, match="wraps a model of tbjax's or transformers', not 'model'"):
        compat.DistributedDataParallel("model")


def test_wrapped_models_say_how_they_are_trained():
    model = run(WRAPPED, model=small())["model"].module
    assert model.training_defaults.precision == "mixed"
    run(CHECKPOINTED, model=model, TransformerLayer=Block)
    assert model.training_defaults.remat == "full"
    every_other = iter([True, False] * 4)
    compat.apply_activation_checkpointing(model, check_fn=lambda _: next(every_other))
    assert model.training_defaults.remat == "full:0.5"
    with pytest.raises(ValueError, match="true of none of the 8 layers, which are Blocks"):
        run(CHECKPOINTED, model=model, TransformerLayer=int)
    offloaded = run(OFFLOADED, model=model)["model"]
    assert offloaded.module.training_defaults.offload == ("optimizer", "parameters")
    (batch,) = batches(1, DENSE.vocab_size)
    with pytest.raises(ValueError, match=r"tbjax\.train\(model\.module"):
        offloaded(batch).loss.backward()
    doubled = compat.checkpoint_wrapper(lambda x: 2 * x)
    assert jax.grad(doubled)(3.0) == 2
    for wrong, message in (
        ({"device_id": 8}, "device_id=8: this process drives 8 devices"),
        ({"use_orig_params": False}, "not made one flat array"),
        ({"sharding_strategy": "SOME"}, "'SOME' is not a strategy"),
    ):
        with pytest.raises(ValueError, match=message):
            compat.FullyShardedDataParallel(model, **wrong)
    with pytest.raises(ValueError, match=r"MixedPrecision\.param_dtype='int8'"):
        compat.MixedPrecision(param_dtype="int8")
    with pytest.raises(ValueError, match="reduce_dtype='float16'"):
        compat.MixedPrecision(param_dtype=pytorch.bfloat16, reduce_dtype="float16")


def test_processes_and_devices_are_asked_after(capsys):
    found = run(CHECKED)
    found["check_distributed"]()
    assert not capsys.readouterr().out  # no group yet
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        distributed.get_rank()
    distributed.init_process_group("gloo", world_size=1, rank=0)
    distributed.barrier()
    found["check_distributed"]()
    found["print_memory_stats"]()  # of no GPU
    assert capsys.readouterr().out == "Rank: 0/1\nBackend: gloo\n"
    held = small()
    assert torch.cuda.memory_allocated(0) >= sum(array.nbytes for array in jax.tree.leaves(held))
    assert torch.cuda.memory_reserved(0) >= torch.cuda.memory_allocated(7)
    assert torch.cuda.device_count() == 8
    for call, message in (
        (lambda: distributed.init_process_group("mpi"), "backend='mpi' is unknown"),
        (lambda: distributed.init_process_group("nccl", world_size=2), "world_size=2, but this is process 0 of 1"),
        (lambda: distributed.init_process_group(init_method="file:///there"), "'env://' or at 'tcp://"),
        (lambda: torch.cuda.set_device(8), "device=8: this process drives 8"),
        (lambda: torch.cuda.memory_allocated(8), "device=8: this process drives 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("platform", "accepted", "refused"),
    [("gpu", ("nccl", "cuda"), ("gloo", "xla")), ("tpu", ("xla", "xla"), ("nccl", "cuda"))],
)
def test_what_contradicts_the_machine_is_refused(platform, accepted, refused, monkeypatch):
    """On a machine with accelerators; CPU devices stand in for any."""
    monkeypatch.setattr(devices, "platform", lambda: platform)
    backend, kind = accepted
    devices.check_backend(backend, "backend")
    devices.check_kind(kind, "device_type")
    backend, kind = refused
    with pytest.raises(ValueError, match=f"backend='{backend}', but this machine's devices are .*, which talk by"):
        devices.check_backend(backend, "backend")
    with pytest.raises(ValueError, match=f"device_type='{kind}', but this machine's devices are .*, which are called"):
        compat.init_device_mesh(kind, (2,), mesh_dim_names=("tp",))


def test_state_is_saved_in_the_background_and_comes_back_on_another_mesh(tmp_path):
    model = compat.FullyShardedDataParallel(small())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    (batch,) = batches(1, DENSE.vocab_size)
    found = run(STORED, model=model, path=tmp_path / "sharded")
    before = {path: np.asarray(array) for path, array in model.state_dict().items()}
    saving = found["async_checkpoint"](model, tmp_path / "background")
    model(batch).loss.backward()
    optimizer.step()  # while it is written: what is saved is as it was
    saving.join()
    assert any((np.asarray(array) != before[path]).any() for path, array in model.state_dict().items())
    other = compat.DistributedDataParallel(tbjax.from_config(DENSE, seed=1))
    for folder in ("sharded", "background"):
        found["load"](other.state_dict(), found["FileSystemReader"](tmp_path / folder))
        for path, array in other.state_dict().items():
            np.testing.assert_array_equal(array, before[path])
    with pytest.raises(TypeError, match="a wrapped model's state_dict"):
        found["save"]({}, found["FileSystemWriter"](tmp_path / "more"))
    with pytest.raises(TypeError, match="a wrapped model's state_dict"):
        torch.save({}, tmp_path / "more")


def test_top_k_sends_what_the_guide_s_function_picks():
    found = run(COMPRESSED, "", torch=pytorch)
    gradient = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    _, picked = found["compress_gradient"](pytorch.from_numpy(gradient))

    def sent(value, key):
        return TopK(0.01).sum(value, Peers.along("dp"), key)

    everywhere = jax.sharding.PartitionSpec()
    mesh = tbjax.make_mesh({"dp": 1}, jax.devices()[:1])
    through = jax.shard_map(sent, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    total, kept = jax.jit(through)(gradient, jax.random.key(0))
    np.testing.assert_array_equal(np.flatnonzero(total), np.sort(picked))
    np.testing.assert_array_equal(total + kept, gradient)
    assert set(np.unique(found["random_sparse"](pytorch.ones(1000), p=0.25))) == {0, 4}  # as ours: scaled up
