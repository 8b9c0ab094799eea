"""Live PyTorch models and tensors: there, back, and refused where it cannot be."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec

import interop
import tbjax
from interop.torch_bridge import from_torch, tensor_to_jax, tensor_to_torch, to_torch
from tbjax.mesh import make_mesh
from tests import processes, tiny

CASES = (
    *tiny.PLAIN,
    *(tiny.BY_NAME[name] for name in ("llama-odd-vocabulary-tied", "falcon-rw", "qwen3_moe-every-other")),
)


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_goes_there_and_back_bit_for_bit(case):
    module = tiny.make(case)
    back = to_torch(from_torch(module, (2, 2, 2)))
    assert type(back) is type(module)
    expected, found = module.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert back.config.to_diff_dict() | {"dtype": None} == module.config.to_diff_dict() | {
        "dtype": None,
        "architectures": [type(module).__name__],
    }


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_all_three_compute_the_same(name):
    case = tiny.BY_NAME[name]
    module = tiny.make(case)
    tokens, mask = tiny.batch(case)
    ours = from_torch(module, (1, 4, 2))
    back = to_torch(ours)
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
        reference, returned = (m(**inputs).logits.numpy()[mask.astype(bool)] for m in (module, back))
    logits = np.asarray(ours(tokens, mask))[mask.astype(bool)]
    for result in (logits, returned):
        assert np.abs(result - reference).max() <= 1e-5 * np.abs(reference).max()


def test_a_tied_head_is_tied_again():
    back = to_torch(from_torch(tiny.make(tiny.BY_NAME["llama-tied"]), (2, 2, 2)))
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


def test_dtypes_can_change_on_either_way():
    module = tiny.make(tiny.BY_NAME["llama"])
    ours = from_torch(module, (2, 2, 2), dtype="bfloat16")
    assert ours.dtype == jnp.bfloat16
    rounded = module.get_input_embeddings().weight.detach().bfloat16()
    assert torch.equal(to_torch(ours).get_input_embeddings().weight, rounded)
    assert torch.equal(to_torch(ours, dtype="float32").get_input_embeddings().weight, rounded.float())


def test_the_dtype_of_the_module_is_kept():
    module = tiny.make(tiny.BY_NAME["llama"], torch.bfloat16)
    ours = from_torch(module, (2, 2, 2))
    assert ours.dtype == jnp.bfloat16
    assert to_torch(ours).dtype == torch.bfloat16


def test_the_two_models_share_no_memory():
    module = transformers.AutoModelForCausalLM.from_config(tiny.hf_config(tiny.BY_NAME["llama"]))
    ours = from_torch(module, (8, 1, 1))
    before = np.array(ours.final_norm.weight[...])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    assert np.array_equal(ours.final_norm.weight[...], before)
    back = to_torch(ours)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.fill_(7)
    assert np.array_equal(ours.final_norm.weight[...], before)


def test_what_came_from_torch_can_be_saved_and_has_its_tokenizer(tmp_path):
    tokenizer = object()
    ours = from_torch(tiny.make(tiny.BY_NAME["llama"]), (2, 2, 2), tokenizer=tokenizer)
    assert ours.tokenizer is tokenizer
    from_torch(tiny.make(tiny.BY_NAME["llama"]), (2, 2, 2)).save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, tiny.make(tiny.BY_NAME["llama"]).lm_head.weight)


def test_what_is_no_causal_language_model_is_refused():
    config = tiny.hf_config(tiny.BY_NAME["llama"])
    with pytest.raises(TypeError, match="Linear is not a transformers model"):
        from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"LlamaModel has no language-model head.*ForCausalLM"):
        from_torch(transformers.AutoModel.from_config(config))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on the meta device"):
        from_torch(empty)


def test_a_family_that_is_not_ours_is_named():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
    with pytest.raises(ValueError, match=r"model_type='gpt2' is not supported.*llama"):
        from_torch(transformers.GPT2LMHeadModel(config))


def test_a_model_that_transformers_does_not_know_cannot_go_there():
    model = tbjax.from_config(tiny.our_config(tiny.BY_NAME["llama"]), (2, 2, 2))
    with pytest.raises(ValueError, match="from_config"):
        to_torch(model)


def test_several_processes_are_told_to_go_over_the_disk():
    script = """
import interop
import tbjax
from tests import tiny

model = tbjax.from_config(tiny.hf_config(tiny.BY_NAME["llama"]), (1, 4, 2))
try:
    interop.to_torch(model)
except ValueError as error:
    print(error)
"""
    for output in processes.run(script):
        assert "there are 2" in output
        assert "save_pretrained" in output


# --- Tensors ----------------------------------------------------------------------------------------------------------

SHARED = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


@pytest.mark.parametrize("dtype", SHARED)
def test_a_tensor_becomes_an_array_without_a_copy(dtype):
    tensor = torch.arange(24).reshape(4, 6).to(getattr(torch, dtype))
    array = tensor_to_jax(tensor)
    assert array.dtype == dtype
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert np.array_equal(np.asarray(array, np.float32), tensor.float().numpy())


@pytest.mark.parametrize("dtype", SHARED)
def test_an_array_becomes_a_tensor_without_a_copy(dtype):
    array = jnp.arange(24).reshape(4, 6).astype(dtype)
    tensor = tensor_to_torch(array)
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert np.array_equal(np.asarray(array, np.float32), tensor.float().numpy())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, 6, requires_grad=True),
        torch.arange(24.0).reshape(4, 6).T,
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0).reshape(4, 6)[1:],  # JAX copies: it does not start where JAX wants memory to start
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.ones(1, 6)[:, :6],
    ],
)
def test_layouts_that_have_no_gaps_cross(tensor):
    assert np.array_equal(tensor_to_jax(tensor), tensor.detach().numpy())


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(4, 6)[:, :3], r"gaps between its elements \(strides \(6, 1\)\): call .contiguous\(\)"),
        (torch.ones(1, 6).expand(4, 6), r"call .contiguous\(\)"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, device="meta"), "on the meta device"),
        (torch.ones(2, dtype=torch.int64), "torch.int64: JAX would narrow it to 32 bits"),
        (torch.ones(2, dtype=torch.float64), "torch.float64: JAX would narrow it to 32 bits"),
    ],
)
def test_tensors_that_cannot_cross_say_why(tensor, what):
    with pytest.raises(ValueError, match=what):
        tensor_to_jax(tensor)


def test_a_sharded_array_is_refused_and_its_parts_are_not():
    mesh = make_mesh((1, 8, 1))
    array = jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, PartitionSpec("fsdp")))
    with pytest.raises(ValueError, match=r"is cut over 8 devices.*addressable_shards"):
        tensor_to_torch(array)
    assert tensor_to_torch(array.addressable_shards[3].data).tolist() == [[6.0, 7.0]]


def test_of_a_replicated_array_one_copy_is_taken():
    array = jax.device_put(jnp.arange(4.0), NamedSharding(make_mesh((8, 1, 1)), PartitionSpec()))
    tensor = tensor_to_torch(array)
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert tensor.data_ptr() == array.addressable_shards[0].data.unsafe_buffer_pointer()


# --- The package ------------------------------------------------------------------------------------------------------


def test_importing_interop_imports_neither_torch_nor_transformers():
    code = "import sys, interop; print([m for m in ('torch', 'transformers', 'jax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_names_of_interop_are_there_and_no_others():
    assert interop.from_torch is from_torch
    assert set(dir(interop)) == {"from_torch", "tensor_to_jax", "tensor_to_torch", "to_torch"}
    with pytest.raises(AttributeError, match="from_tensorflow"):
        interop.from_tensorflow  # noqa: B018 - asking is the test
