"""Native products and what stands between them: the compiler takes them, and they are what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax import native
from tbjax.layers.linear import as_sharding
from tbjax.mesh import make_mesh
from tests.generate.test_engine import CONFIG, PROMPTS, one_device

X = jax.random.normal(jax.random.key(0), (2, 5, 96), jnp.bfloat16)
WEIGHT = jax.random.normal(jax.random.key(1), (160, 96), jnp.bfloat16)


@pytest.fixture
def served():
    """A mesh of one CPU that has native products."""
    if not native._works(jax.devices()[0]):
        pytest.skip("this compiler has no native products")
    return as_sharding(make_mesh((1, 1, 1), jax.devices()[:1]))


def test_a_product_is_summed_in_float32_and_rounded_once():
    found = jax.jit(native.matmul)(X, WEIGHT)
    exact = np.einsum("bsi,oi->bso", *(np.asarray(a, np.float64) for a in (X, WEIGHT)))
    assert (found.shape, found.dtype) == (exact.shape, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-4)
    wide = jax.jit(native.matmul)(X.astype(jnp.float32), WEIGHT.astype(jnp.float32))
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-4)
    alone = jax.jit(native.matmul)(X[:1, :1], WEIGHT)
    np.testing.assert_allclose(np.asarray(alone, np.float64), exact[:1, :1], rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("features", [576, 2048, 100])
def test_a_single_row_is_multiplied_within_one_loop_over_the_weight(features):
    x = jax.random.normal(jax.random.key(2), (1, 1, features), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(3), (64, features), jnp.bfloat16)

    def repeatedly(x, weight, count):
        # Each time with an x that the loop has made.
        def once(_, carry):
            return carry[0] + 0 * carry[1][..., :1], native.matmul(carry[0], weight)

        return jax.lax.fori_loop(0, count, once, (x, jnp.zeros((1, 1, 64), x.dtype)))[1]

    count = jnp.int32(2)
    compiled = jax.jit(repeatedly).lower(x, weight, count).compile()
    exact = np.asarray(x, np.float64)[0] @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(np.asarray(compiled(x, weight, count), np.float64)[0], exact, rtol=2**-8, atol=1e-4)
    # The weight in float32 is nowhere an array that one loop would hand to another.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * weight.size


@pytest.mark.parametrize("rows", [2, 8, 128])
def test_several_rows_are_multiplied_without_a_cast_of_the_weight(rows):
    x = jax.random.normal(jax.random.key(2), (rows, 576), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(3), (1536, 576), jnp.bfloat16)
    compiled = jax.jit(native.matmul).lower(x, weight).compile()
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(np.asarray(compiled(x, weight), np.float64), exact, rtol=2**-8, atol=1e-4)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * weight.size


def test_what_stands_between_products_is_rounded_once_and_lies_as_they_take_it(served):
    weights = jax.random.normal(jax.random.key(4), (2, 3, 64, 128), jnp.bfloat16)
    values = jax.random.normal(jax.random.key(5), (2, 3, 128, 64), jnp.bfloat16)
    heads = jnp.moveaxis(values, 1, 2)
    dimensions = ((3,), (2,)), ((0, 1), (0, 1))
    assert native.wide(values) is values
    assert native.laid_heads_first(heads) is heads
    assert native.dot_summed_wide(weights, values, dimensions).dtype == jnp.bfloat16
    with native.where_it_serves(served):
        assert native.wide(values).dtype == jnp.float32
        compiled = jax.jit(lambda a, b: native.dot_summed_wide(a, b, dimensions)).lower(weights, values).compile()
        turned = jax.jit(lambda a: native.laid_heads_first(a * 2)).lower(heads).compile()
    exact = np.asarray(weights, np.float64) @ np.asarray(values, np.float64)
    np.testing.assert_allclose(compiled(weights, values), exact, rtol=1e-5, atol=1e-4)
    # Neither operand is cast.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * values.size
    np.testing.assert_array_equal(turned(heads), heads * 2)
    assert turned.output_formats.layout.major_to_minor == (0, 2, 1, 3)


def test_heads_are_joined_before_a_product_reads_them(served):
    heads = jax.random.normal(jax.random.key(6), (1, 1, 9, 64))
    weight = jax.random.normal(jax.random.key(7), (128, 576), jnp.bfloat16)

    def project(heads, weight):
        return native.matmul(native.heads_joined(heads, jnp.bfloat16), weight)

    with native.where_it_serves(served):
        compiled = jax.jit(project).lower(heads, weight).compile()
    exact = np.asarray(heads.reshape(-1).astype(jnp.bfloat16), np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(np.asarray(compiled(heads, weight), np.float64)[0, 0], exact, rtol=2**-8, atol=1e-4)
    (loop,) = (part for part in compiled.as_text().split("\n\n") if " dot(" in part)
    assert "9,64]" not in loop


def test_a_row_is_looked_up_without_a_cast_of_the_table(served):
    table = jax.random.normal(jax.random.key(8), (1000, 64), jnp.bfloat16)
    tokens = jnp.array([[3, 999, 5000, -7]])

    def repeatedly(table, tokens, count):
        def once(_, carry):
            return carry[0] + 1, carry[1] + native.take(table, carry[0]).astype(jnp.float32)

        return jax.lax.fori_loop(0, count, once, (tokens, jnp.zeros((1, 4, 64))))[1]

    with native.where_it_serves(served):
        compiled = jax.jit(repeatedly).lower(table, tokens, jnp.int32(2)).compile()
    wanted = np.asarray(table, np.float32)
    np.testing.assert_array_equal(
        compiled(table, tokens, jnp.int32(2)), wanted[[[3, 999, 999, 0]]] + wanted[[[4, 999, 999, 0]]]
    )
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes


def test_where_the_compiler_casts_the_weight_they_are_not_asked_for(monkeypatch):
    def cast(x, weight):
        return jnp.einsum(
            "...i,oi->...o", x.astype(jnp.float32), jax.lax.optimization_barrier(weight.astype(jnp.float32))
        )

    monkeypatch.setattr(native, "matmul", cast)
    assert not native._works.__wrapped__(jax.devices()[0])


def test_they_are_asked_for_on_one_cpu_that_has_them():
    serves = native._works(jax.devices()[0])
    for mesh, wanted in (((1, 1, 1), serves), ((1, 1, 2), False)):
        sharding = as_sharding(make_mesh(mesh, jax.devices()[: mesh[2]]))
        assert not native.asked_for(X, WEIGHT)
        with native.where_it_serves(sharding):
            assert native.asked_for(X, WEIGHT) is wanted
            assert not native.asked_for(X, WEIGHT.astype(jnp.float32))
            # In float32 of a few rows: one is read as fast in either order, and many are multiplied as fast.
            for rows, few in ((1, False), (2, True), (512, True), (513, False)):
                assert native.asked_for(jnp.zeros((1, rows, 96)), WEIGHT.astype(jnp.float32)) is (wanted and few)
        assert not native.asked_for(X, WEIGHT)


def test_generation_does_all_of_it(served, monkeypatch):
    jax.clear_caches()  # programs of other tests would not be traced again
    asked = set()

    def told(name):
        function = getattr(native, name)

        def call(*arguments):
            if native._asked.get():
                asked.add(name)
            return function(*arguments)

        monkeypatch.setattr(native, name, call)

    every = {"matmul", "dot_summed_wide", "wide", "laid_heads_first", "heads_joined", "take"}
    for name in every:
        told(name)
    tbjax.from_config(CONFIG, one_device(), dtype="bfloat16").generate(PROMPTS, max_new_tokens=2)
    assert asked == every


def test_what_is_written_by_them_is_scored_alike_without():
    native._works.cache_clear()  # it is to be asked while a program is traced
    made = tbjax.from_config(CONFIG, one_device(), seed=3, dtype="bfloat16")
    tokens = [[*prompt, 1, 2, 3] for prompt in PROMPTS]
    found = made.generate(tokens, max_new_tokens=4, return_dict_in_generate=True)
    wanted = made.loglikelihood(tokens, [answer.tokens for answer in found])
    for answer, likelihood in zip(found, wanted, strict=True):
        np.testing.assert_allclose(answer.log_probabilities, likelihood.log_probabilities, atol=0.05)
