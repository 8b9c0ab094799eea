"""Every family on every mesh: the one-device logits and gradients, on each device the bytes that arithmetic says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding, leaves
from tests import by_table, tiny

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2))
EXPERT_MESHES = ({"ep": 2, "fsdp": 2, "tp": 2}, {"ep": 4, "dp": 2}, {"ep": 4, "tp": 2})
CORNERS = ("llama-odd-vocabulary-tied", "llama-one-kv-head", "llama-three-kv-heads", "falcon-7b", "falcon-rw")
BATCH = 8

# Which mesh axes cut each dimension of a parameter, said once more and in other words than tbjax.sharding has it.
CUT_BY = {"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp", "experts": "ep", "embed": "fsdp"}


def cases():
    for case in tiny.PLAIN:
        for mesh in MESHES:
            yield pytest.param(case, mesh, id=f"{case}-{mesh}")
        if "moe" in case.name or case.name == "mixtral":
            for mesh in EXPERT_MESHES:
                yield pytest.param(case, mesh, id=f"{case}-{mesh}")
    for name in CORNERS:
        yield pytest.param(tiny.BY_NAME[name], (2, 2, 2), id=f"{name}-(2, 2, 2)")
        yield pytest.param(tiny.BY_NAME[name], (1, 1, 8), id=f"{name}-(1, 1, 8)")


@pytest.mark.parametrize(("case", "spec"), list(cases()))
def test_a_mesh_changes_where_things_lie_and_nothing_else(case, spec):
    config = tiny.our_config(case)
    sharding = Sharding(make_mesh(spec))
    abstract = sharding.place(jax.eval_shape(lambda: Decoder(config, sharding)))
    placements = [leaf.sharding for leaf in jax.tree.leaves(abstract)]
    model = jax.tree.unflatten(
        jax.tree.structure(abstract),
        [jax.device_put(value, place) for value, place in zip(parameters(case), placements, strict=True)],
    )
    assert held(model) == expected(abstract, sharding)

    logits, gradients = evaluate(model, tokens(case))
    reference, reference_gradients = on_one_device(case)
    assert distance(logits, reference) <= 1e-5
    whole = np.sqrt(sum(np.linalg.norm(wanted) ** 2 for wanted in reference_gradients))
    for leaf, gradient, wanted in zip(leaves(model), jax.tree.leaves(gradients), reference_gradients, strict=True):
        if np.linalg.norm(wanted) < 1e-6 * whole:  # zero but for rounding: a softmax does not see the bias of its keys
            assert leaf.path.endswith("key.bias")
            assert np.linalg.norm(gradient) < 1e-6 * whole
        else:
            assert distance(gradient, wanted) <= 1e-5, leaf.path


@pytest.mark.parametrize("case", [tiny.BY_NAME["llama"], tiny.BY_NAME["qwen3_moe"]], ids=str)
def test_sequence_parallelism_and_unrolling_change_nothing(case):
    config = tiny.our_config(case)
    reference, reference_gradients = on_one_device(case)
    for settings, scan in (({"sequence_parallel": True}, True), ({}, False)):
        sharding = Sharding(make_mesh((2, 2, 2)), **settings)
        abstract = sharding.place(jax.eval_shape(lambda s=sharding, scan=scan: Decoder(config, s, scan=scan)))
        values = [
            jax.device_put(v, leaf.sharding)
            for v, leaf in zip(parameters(case), jax.tree.leaves(abstract), strict=True)
        ]
        logits, gradients = evaluate(jax.tree.unflatten(jax.tree.structure(abstract), values), tokens(case))
        assert distance(logits, reference) <= 1e-5
        for gradient, wanted in zip(jax.tree.leaves(gradients), reference_gradients, strict=True):
            assert distance(gradient, wanted) <= 1e-5


def test_parameters_are_gathered_layer_by_layer_not_as_a_stack():
    case = tiny.BY_NAME["llama"]
    config = tiny.our_config(case)
    sharding = Sharding(make_mesh((1, 8, 1)))
    abstract = sharding.place(jax.eval_shape(lambda: Decoder(config, sharding)))
    program = jax.jit(lambda model, tokens: model(tokens)).lower(abstract, tokens(case)).compile().as_text()
    gathered = [line for line in program.splitlines() if "all-gather(" in line]
    assert gathered
    stack = f"[{config.layers},{config.mlp},{config.embed}]"
    assert not [line for line in gathered if line.split("=")[1].lstrip().startswith(f"f32{stack}")]


@jax.jit
def evaluate(model, tokens):
    def loss(model):
        out = model.forward(tokens)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        balance = 0.0 if out.auxiliary_loss is None else 0.1 * out.auxiliary_loss
        return balance - jnp.mean(likelihood), out.logits

    gradients, logits = jax.grad(loss, has_aux=True)(model)
    return logits, gradients


@functools.cache
def parameters(case) -> list[np.ndarray]:
    config = tiny.our_config(case)
    ours = by_table.read(config, tiny.tensors(case))
    return [ours[leaf.path] for leaf in leaves(jax.eval_shape(lambda: Decoder(config)))]


@functools.cache
def on_one_device(case):
    config = tiny.our_config(case)
    structure = jax.tree.structure(jax.eval_shape(lambda: Decoder(config)))
    logits, gradients = evaluate(jax.tree.unflatten(structure, parameters(case)), tokens(case))
    return np.asarray(logits), [np.asarray(g) for g in jax.tree.leaves(gradients)]


def tokens(case) -> np.ndarray:
    return np.random.default_rng(5).integers(0, tiny.our_config(case).vocab_size, (BATCH, 12)).astype(np.int32)


def held(model) -> dict[int, int]:
    """The bytes of parameters on each device."""
    totals = dict.fromkeys(range(8), 0)
    for array in jax.tree.leaves(model):
        for shard in array.addressable_shards:
            totals[shard.device.id] += shard.data.nbytes
    return totals


def expected(abstract, sharding) -> dict[int, int]:
    """The same by arithmetic: each tensor over the product of the degrees that cut it."""
    size = sharding.mesh.shape
    total = 0
    for path, dims, variable in leaves(abstract):
        degree = 1
        for dim, length in zip(dims, variable.shape, strict=True):
            by = size[CUT_BY[dim]] if dim in CUT_BY else 1
            if dim == "embed" and "experts" not in dims:
                by *= size["ep"]
            if dim == "kv_heads" and length % by:
                by = 1
            assert length % by == 0, path
            degree *= by
        total += math.prod(variable.shape) // degree * variable.dtype.itemsize
    return dict.fromkeys(range(8), total)


def distance(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30))
