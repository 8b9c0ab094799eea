"""The built-in descriptions: each against transformers and against the published size, and what unknown names get."""

import pytest
import transformers

from interop.families import Fields, family
from tbjax.config import ModelConfig
from tbjax.planner import models
from tbjax.planner.models import UnknownModel, describe, known, names
from tbjax.planner.parameters import active_parameters, parameters

# Parameters as published: the totals of the safetensors files on the hub, where a tied head is counted once; for Gemma
# the sums of the tables in the technical reports (arXiv 2408.00118 table 2, 2503.19786 table 1, text part).
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_630_071_296,
    # The files hold the embedding a second time, as the head that is tied to it: 65,024 x hidden_size.
    "tiiuae/falcon-7b": 7_217_189_760 - 65_024 * 4_544,
    "tiiuae/falcon-40b": 41_303_293_952,
    "tiiuae/falcon-180B": 179_522_565_120 - 65_024 * 14_848,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 751_632_384 - 151_936 * 1_024,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151_936 * 2_048,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "google/gemma-2-2b": 590e6 + 2_024e6,
    "google/gemma-2-9b": 918e6 + 8_324e6,
    "google/gemma-2-27b": 1_180e6 + 26_047e6,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 302e6 + 698e6,
    "google/gemma-3-4b-pt": 675e6 + 3_209e6,
    "google/gemma-3-12b-pt": 1_012e6 + 10_759e6,
    "google/gemma-3-27b-pt": 1_416e6 + 25_600e6,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


def config(name: str) -> ModelConfig:
    values = describe(name)
    return family(values["model_type"]).config(Fields(values, name))


def test_every_model_has_a_published_size() -> None:
    assert set(names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_description_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters(config(name)) == pytest.approx(PUBLISHED[name], rel=0.005)


# As the model cards say: Mixtral "uses 13B active", 8x22B "39B active"; Qwen 3 in the names.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 12.9),
        ("mistralai/Mixtral-8x22B-v0.1", 39.2),
        ("Qwen/Qwen3-30B-A3B", 3.3),
        ("Qwen/Qwen3-235B-A22B", 22.2),
        ("Qwen/Qwen3-Coder-480B-A35B-Instruct", 35.4),
    ],
)
def test_a_mixture_has_the_published_number_of_active_parameters(name: str, billions: float) -> None:
    assert active_parameters(config(name)) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings.*")
@pytest.mark.parametrize("name", list(models._entries()))
def test_transformers_has_nothing_to_fill_in(name: str) -> None:
    values = describe(name)
    filled = transformers.AutoConfig.for_model(**values).to_dict()
    assert family(values["model_type"]).config(Fields(filled)) == config(name)
    assert {field: filled[field] for field in values if field != "dtype"} == {
        field: value for field, value in values.items() if field != "dtype"
    }


def test_a_name_is_found_however_it_is_written() -> None:
    whole = describe("meta-llama/Llama-2-70b-hf")
    for spelling in ("META-LLAMA/LLAMA-2-70B-HF", "Llama-2-70b-hf", "llama-2-70b", "Llama-2-70b-chat-hf"):
        assert known(spelling)
        assert describe(spelling) == whole
    assert len(models._index()) == len({models._normal(name) for name in models._index()})


def test_a_variant_differs_in_what_it_says() -> None:
    first, third = describe("mistralai/Mistral-7B-v0.1"), describe("mistralai/Mistral-7B-v0.3")
    assert (first["sliding_window"], first["vocab_size"]) == (4096, 32000)
    assert third["sliding_window"] is None  # left out, transformers would fill in 4096
    assert third["vocab_size"] == 32768
    assert {field for field in first if first[field] != third.get(field)} == {
        "sliding_window",
        "vocab_size",
        "rope_parameters",
    }


def test_a_description_may_be_changed_without_harm() -> None:
    describe("google/gemma-3-1b-pt")["rope_parameters"].clear()
    assert describe("google/gemma-3-1b-pt")["rope_parameters"]
    assert describe("google/gemma-3-1b-pt")["layer_types"].count("full_attention") == 4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("meta-llama/Llama-2-71b-hf", r"'meta-llama/Llama-2-71b-hf' has no built-in .* mean .*meta-llama/Llama-2-7"),
        ("mixtral-8x7", r"Did you mean .*mixtral-8x7b"),
        (
            "gpt2",
            r"'gpt2' has no built-in description\. There are \d\d of them, by meta-llama, .*path of its config\.json",
        ),
        ("", r"'' has no built-in description"),
    ],
)
def test_an_unknown_name_is_never_taken_for_another(name: str, says: str) -> None:
    assert not known(name)
    with pytest.raises(UnknownModel, match=says) as error:
        describe(name)
    assert len(str(error.value)) < 400  # a paragraph, not a catalogue
