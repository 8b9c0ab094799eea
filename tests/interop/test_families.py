"""Configs are translated whole or refused by name, and weight tables are one to one with what transformers writes."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from interop.families import FAMILIES, Fields, family
from tbjax.config import LayerKind, ModelConfig
from tbjax.layers.rope import frequencies
from tests import by_table, tiny
from tests.tiny import Case


def translate(model_type: str, values: dict[str, Any]) -> ModelConfig:
    return family(model_type).config(Fields(values))


def from_file(values: dict[str, Any]) -> ModelConfig:
    """As a config.json goes: through transformers, which fills in and brings up to date, to us."""
    return translate(values["model_type"], transformers.AutoConfig.for_model(**values).to_dict())


# --- Every field is accounted for -------------------------------------------------------------------------------------


# Fields, common to all families, that do not change what the network computes in inference or in training without
# dropout (and a router's jitter, which is dropout by another name).
INERT = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id cache_implementation chunk_size_feed_forward
    decoder_start_token_id embd_pdrop eos_token_id hidden_dropout id2label initializer_range keys_to_ignore_at_inference
    label2id model_type num_labels output_attentions output_hidden_states output_router_logits pad_token_id problem_type
    resid_pdrop return_dict router_jitter_noise sep_token_id torch_dtype transformers_version use_cache
    """.split()
)

# The same, for one family.
FAMILY_INERT = {
    # Once cut the matrix products into so many slices, to repeat the rounding of training.
    "llama": {"pretraining_tp"},
    # transformers turns both into `layer_types` and `sliding_window`.
    "qwen2": {"max_window_layers", "use_sliding_window"},
    "qwen3": {"max_window_layers", "use_sliding_window"},
    # The class does not know it: with a window, all layers have it.
    "qwen3_moe": {"max_window_layers"},
    # Stands in the files beside `hidden_activation`, which is the one that counts.
    "gemma2": {"hidden_act"},
    # The pattern has become `layer_types`.
    "gemma3_text": {"hidden_act", "_sliding_window_pattern", "sliding_window_pattern"},
    # With alibi; otherwise it is read.
    "falcon": {"rope_parameters"},
    # transformers copies both into `rope_parameters`, where they are read.
    "phi3": {"original_max_position_embeddings", "partial_rotary_factor"},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_the_config_class_is_read_or_known_to_change_nothing(model_type: str) -> None:
    configs = [transformers.AutoConfig.for_model(model_type)]
    configs += [tiny.hf_config(case) for case in tiny.CASES if case.model_type == model_type]
    for config in configs:
        fields = Fields(config.to_dict())
        FAMILIES[model_type].config(fields)
        undecided = fields.names() - fields.read - INERT - FAMILY_INERT.get(model_type, set())
        assert not undecided, f"decide whether these change what {model_type} computes: {sorted(undecided)}"


def test_an_unknown_model_type_lists_the_families() -> None:
    with pytest.raises(ValueError, match=r"model_type='mamba' is not supported: tbjax does llama, mistral, .*olmo2"):
        family("mamba")


# --- What is not done is refused by name ------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("gemma2", {"hidden_activation": "quick_gelu"}, "hidden_activation='quick_gelu'"),
        ("falcon", {"activation": "relu"}, "activation='relu'"),
        ("llama", {"vocab_size": None}, "vocab_size=None"),
        ("llama", {"hidden_size": 0}, "hidden_size=0"),
        ("llama", {"hidden_size": 4}, "hidden_size=4"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llama", {"head_dim": 7}, "head_dim=7"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ("llama", {"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ("llama", {"kv_lora_rank": 512}, "kv_lora_rank=512"),
        ("llama", {"attention_sinks": True}, "attention_sinks=True"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("qwen3", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window=None"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types="),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types="),
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar=-1"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"rope_parameters": {"full_attention": YARN}}, "rope_parameters: sliding_attention=None"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {**YARN, "truncate": False}, "sliding_attention": YARN}},
            "rope_parameters: full_attention: truncate=False",
        ),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn=False"),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3"),
        ("falcon", {"new_decoder_architecture": False, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads=3"),
        (
            "falcon",
            {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 2},
            "num_kv_heads=2",
        ),
        (
            "falcon",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm=True",
        ),
        ("llama", {"rope_parameters": None}, "rope_parameters=None"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type='proportional'"),
        ("llama", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: rope_theta=None"),
        ("llama", {"rope_parameters": {**YARN, "mrope_section": [1, 2]}}, "rope_parameters: mrope_section=[1, 2]"),
        ("llama", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("phi3", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.2}}, "partial_rotary_factor=0.2"),
        ("llama", {"rope_parameters": {**YARN, "rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
        ("llama", {"rope_parameters": {**YARN, "beta_slow": 1e-300}}, "beta_slow=1e-300"),
        ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
        ("llama", {"rope_parameters": {**LONG, "long_factor": [1.0] * 7}}, "long_factor="),
        ("llama", {"rope_parameters": {**LONG, "short_factor": [0.0] * 8}}, "short_factor="),
        ("gemma2", {"rope_parameters": {"full_attention": YARN}}, "rope_parameters: full_attention="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_done_is_refused_by_name(model_type: str, changes: dict[str, Any], named: str) -> None:
    case = next(case for case in tiny.PLAIN if case.model_type == model_type)
    with pytest.raises(ValueError, match=re.escape(named) + r".* is not supported: ."):
        translate(model_type, tiny.hf_config(case).to_dict() | changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.integers(-(10**400), 10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_config_is_translated_or_refused_by_name(data: st.DataObject) -> None:
    values = json.loads(json.dumps(tiny.hf_config(data.draw(st.sampled_from(tiny.CASES))).to_dict()))
    for _ in range(data.draw(st.integers(1, 3))):
        section = values
        if data.draw(st.booleans()) and isinstance(values["rope_parameters"], dict):
            section = values["rope_parameters"]
        section[data.draw(st.sampled_from(sorted(section) or ["rope_type"]))] = data.draw(JSON)
    entry = FAMILIES.get(values["model_type"]) if isinstance(values["model_type"], str) else None
    if entry is None:
        return
    try:
        config = entry.config(Fields(values))
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
        assert hash(config) == hash(entry.config(Fields(values)))
        assert entry.weights(config)
    assert refusal is None or re.fullmatch(r"config\.json: .*=.* is not supported: .+\.", refusal, re.DOTALL)


# --- Old and real configs ---------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}


def test_rope_scaling_of_old_files_is_understood() -> None:
    old = {**SIZES, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = from_file({"model_type": "llama", **old}).rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 5e5, 2.0)
    old = {
        **SIZES,
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    }
    config = from_file({"model_type": "gemma3_text", **old})
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("linear", 1e6, 8)
    assert (config.window_rope.kind, config.window_rope.theta) == ("default", 2e4)
    old = {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "max_position_embeddings": 128,
    }
    rope = from_file({"model_type": "phi3", **SIZES, **old, "original_max_position_embeddings": 32}).rope
    assert (rope.kind, rope.original_positions, rope.factor) == ("longrope", 32, 4.0)
    assert rope.attention_factor == pytest.approx((1 + 2 / 5) ** 0.5)  # log 4 / log 32


factors = st.floats(1, 64)
lengths = st.integers(2, 10_000)
turns = st.just(0) | st.floats(1e-6, 64)
ROPES = st.one_of(
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": factors}),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": factors, "original_max_position_embeddings": lengths},
        optional={
            "attention_factor": st.floats(0.1, 2),
            "mscale": st.floats(0, 2),
            "mscale_all_dim": st.floats(0, 2),
            "beta_fast": turns,
            "beta_slow": turns,
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("llama3"), "factor": factors, "original_max_position_embeddings": lengths}
        | {"low_freq_factor": st.floats(0.5, 2), "high_freq_factor": st.floats(2.5, 16)}
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("longrope"), "original_max_position_embeddings": lengths}
        | {name: st.lists(factors, min_size=8, max_size=8) for name in ("short_factor", "long_factor")},
        optional={"factor": factors, "attention_factor": st.floats(0.1, 2)},
    ),
)


@settings(max_examples=100, deadline=None)
@given(parameters=ROPES, theta=st.floats(2, 1e7), trained=lengths, length=lengths)
def test_any_rope_turns_as_in_transformers(parameters: dict, theta: float, trained: int, length: int) -> None:
    config = transformers.AutoConfig.for_model(
        "llama", **SIZES, rope_parameters={**parameters, "rope_theta": theta}, max_position_embeddings=trained
    )
    wanted, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    rope = translate("llama", config.to_dict()).rope
    # Dynamic rope takes a difference that loses up to `factor` units of float32: 64 * 1.2e-7, of either side.
    ours = np.broadcast_to(frequencies(rope, 16, jnp.array([length])), (1, *wanted.shape))  # one row of that length
    np.testing.assert_allclose(ours[0], wanted.numpy(), rtol=2e-5)
    assert rope.attention_factor == pytest.approx(scale)


REAL = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
        | {"rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}}
        | {"max_position_embeddings": 131072, "torch_dtype": "bfloat16"},
    ),
    "Mixtral-8x7B": (
        46_702_792_704,
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000},
    ),
    "falcon-7b": (
        6_921_720_704,
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
        | {"vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}
        | {"apply_residual_connection_post_layernorm": False, "new_decoder_architecture": False},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
        | {"num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "use_sliding_window": False}
        | {"max_window_layers": 28, "sliding_window": 131072, "use_mrope": False},
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32}
        | {"num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936, "head_dim": 128}
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
        | {"max_window_layers": 48, "mlp_only_layers": []},
    ),
    "gemma-2-9b": (
        9_241_705_984,
        {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16}
        | {"num_hidden_layers": 42, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window_size": 4096},
    ),
    "gemma-3-1b": (
        999_885_952,
        {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4}
        | {"num_hidden_layers": 26, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_theta": 1000000},
    ),
    "Phi-4-mini": (
        3_836_021_760,
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 200064, "partial_rotary_factor": 0.75}
        | {"tie_word_embeddings": True, "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}}
        | {"eos_token_id": 199999, "pad_token_id": 199999, "bos_token_id": 199999},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_configs_give_the_published_number_of_parameters(name: str) -> None:
    published, values = REAL[name]
    config = from_file(values)
    sizes = {path: int(np.prod(shape)) for path, shape in by_table.shapes(config).items()}
    padding = (config.padded_vocab - config.vocab_size) * config.embed * (1 if config.tie_embeddings else 2)
    assert sum(sizes.values()) - padding == published


def test_layers_are_grouped_by_the_pattern_that_repeats() -> None:
    window = LayerKind(window=512)
    groups = from_file(REAL["gemma-3-1b"][1]).groups
    assert [(group.pattern, group.repeats) for group in groups] == [((window,) * 5 + (LayerKind(),), 4), ((window,), 2)]


# --- Weight tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_the_table_is_one_to_one_with_what_transformers_writes(case: Case, tmp_path: Path) -> None:
    tiny.save(case, tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    config = tiny.our_config(case)
    ours = by_table.read(config, on_disk)
    # Backwards, every row of every tensor comes from exactly one of our parameters.
    again = by_table.write(config, ours)
    assert again.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert np.array_equal(again[name], tensor), name
    # Forwards, every element of ours was filled from exactly one tensor: all are, and there are as many as on disk.
    filled = by_table.read(config, {name: np.ones_like(tensor) for name, tensor in on_disk.items()})
    assert sum(value.sum() for value in filled.values()) == sum(tensor.size for tensor in on_disk.values())
    for path, value in filled.items():
        assert (value[: config.vocab_size] if path in ("embedding.weight", "head.weight") else value).all(), path


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_the_saved_config_translates_alike(case: Case, tmp_path: Path) -> None:
    tiny.hf_config(case).save_pretrained(tmp_path)
    values = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert translate(case.model_type, values) == tiny.our_config(case)


@pytest.mark.parametrize("entry", FAMILIES.values(), ids=FAMILIES.keys())
def test_tensors_that_carry_nothing_are_not_in_the_table(entry: Any) -> None:
    case = next(case for case in tiny.PLAIN if case.model_type == entry.name)
    sources = [weight.source for weight in entry.weights(tiny.our_config(case))]
    assert not [source for source in sources for pattern in entry.ignored if re.fullmatch(pattern, source)]
    assert {original for _, original in entry.copies} <= set(sources)


def test_a_model_is_shared_between_tests_and_the_same_in_every_dtype() -> None:
    case = tiny.BY_NAME["llama"]
    assert tiny.make(case) is tiny.make(case)
    wide = dict(tiny.make(case, torch.float64).named_parameters())
    for name, parameter in tiny.make(case).named_parameters():
        assert torch.equal(parameter.double(), wide[name])
