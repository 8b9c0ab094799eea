"""A plan: found, explained, kept, compared with the compiler; and what it says where nothing fits."""

import dataclasses
import json

import pytest

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner import plan as planning
from tbjax.planner.hardware import cluster
from tbjax.planner.legal import Space
from tbjax.planner.memory import memory
from tbjax.planner.plan import Plan, plan
from tbjax.planner.search import anything_fits, search
from tbjax.planner.verify import CompilationError
from tbjax.planner.workload import Layout, Workload
from tests.planner import plans


def llama(layers=32, embed=4096):
    """Llama 2 7B, or with other sizes."""
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        embed=embed,
        mlp=11008 * embed // 4096,
        heads=embed // 128,
        kv_heads=embed // 128,
        head_dim=128,
        layer_kinds=(LayerKind(),) * layers,
        max_positions=4096,
    )


TRAINING = Workload(global_batch=64, seq_len=4096)
SERVING = Workload(task="inference", global_batch=8, seq_len=2048, new_tokens=256)


def made(spec="h100:8", workload=TRAINING, config=None, **options):
    return plan(config or llama(), workload, cluster(spec), **options)


# --- What is found ----------------------------------------------------------------------------------------------------


def test_a_plan_is_what_the_search_found():
    found = search(Space(llama(), TRAINING, cluster("h100:8"), {"offload": ()}))
    best, *others = found.best
    result = made()
    assert (result.layout, result.memory, result.time) == (best.layout, best.memory, best.time)
    assert result.candidates == tuple(others)
    assert result.rejected == found.rejected
    assert result.fits
    assert result.missing == 0
    assert result.mesh == best.layout.mesh


def test_throughput_is_tokens_over_time():
    result = made()
    assert result.tokens_per_second == 64 * 4096 / result.time.total
    assert 0.2 < result.mfu < 0.75


def test_offloading_is_the_last_resort_unless_it_is_asked_for():
    config, crowded = llama(80, 8192), Workload(global_batch=8, seq_len=2048)
    space = Space(config, crowded, cluster("h100:8"))
    assert not search(dataclasses.replace(space, fixed={"offload": ()})).fits
    assert made("h100:8", crowded, config).layout.offload
    assert not made().layout.offload
    roomy = Workload(global_batch=512, seq_len=4096)
    anywhere = search(Space(config, roomy, cluster("h100:8x8"))).best[0]
    assert anywhere.layout.offload  # on paper it is quicker there
    assert not made("h100:8x8", roomy, config).layout.offload
    assert made("h100:8x8", roomy, config, fixed={"offload": "any"}).layout == anywhere.layout
    assert made(fixed={"offload": ("optimizer",)}).layout.offload == ("optimizer",)


def test_the_objective_decides():
    quick, small = made(objective="throughput"), made(objective="memory")
    assert quick.time.total < small.time.total
    assert quick.memory.total > small.memory.total
    assert small.objective == "memory"


def test_the_most_that_can_be_served_fits_and_one_more_does_not():
    result = made(workload=SERVING)
    hardware, layout = result.cluster.hardware, result.layout
    assert result.maximum_batch

    def held(batch):
        return memory(result.config, dataclasses.replace(SERVING, global_batch=batch), layout, hardware).total

    assert held(result.maximum_batch) <= hardware.usable < held(result.maximum_batch + layout.batch_ways)
    assert made().maximum_batch is None


# --- Where nothing fits -----------------------------------------------------------------------------------------------


def test_where_nothing_fits_the_plan_says_what_is_missing_and_what_would_do():
    result = made("h100:2", config=llama(80, 8192), workload=Workload(global_batch=16, seq_len=4096))
    assert not result.fits
    assert result.missing == result.memory.total - result.cluster.hardware.usable > 0
    assert result.smallest
    assert anything_fits(Space(result.config, result.workload, result.smallest))
    text = result.explain()
    assert f"{result.missing / 2**30:.0f} GiB" in text
    assert str(result.smallest) in text


def test_the_smallest_cluster_is_the_smallest():
    result = made("h100:1", config=llama(80, 8192), workload=Workload(global_batch=48, seq_len=4096))
    assert result.smallest
    hosts = [cluster(f"h100:{n}") for n in (2, 4, 8)] + [cluster(f"h100:{n}x8") for n in range(2, 9)]
    smaller = [each for each in hosts if each.devices < result.smallest.devices]
    assert not any(anything_fits(Space(result.config, result.workload, each)) for each in smaller)


def test_the_smallest_cluster_keeps_what_was_fixed():
    result = made("h100:3", config=llama(40, 5120), workload=Workload(global_batch=96, seq_len=4096), fixed={"dp": 3})
    assert not result.fits
    assert result.smallest
    assert result.smallest.devices % 3 == 0


def test_where_no_number_of_devices_would_do_that_is_said():
    long = Workload(global_batch=1, seq_len=4096 * 4096 + 1)  # odd: no axis can cut it
    result = made("h100:1", workload=long, config=llama(1), fixed={"tp": 1, "offload": ()})
    assert not result.fits
    assert result.smallest is None
    assert "Nor would anything fit" in result.explain()


# --- Words ------------------------------------------------------------------------------------------------------------


def test_the_explanation_compares_with_the_runner_up():
    result = made()
    text = result.explain()
    assert "Fits" in text
    assert "The next best is" in text
    assert " GiB" in text


@pytest.mark.parametrize("name", ["64 GPUs", "v5p", "serving", "does not fit"])
def test_a_plan_prints_without_a_terminal(name):
    text = str(plans.PLANS[name]())
    assert "GiB" in text
    assert "\x1b" not in text


# --- Kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_plan_comes_back_from_json_as_it_was(name):
    written = plans.PLANS[name]()
    read = Plan.from_json(written.to_json())
    assert read == written
    assert hash(read) == hash(written)
    assert (read.config, read.workload, read.layout, read.cluster) == (
        written.config,
        written.workload,
        written.layout,
        written.cluster,
    )
    assert (read.memory, read.time) == (written.memory, written.time)


def test_a_plan_that_was_searched_comes_back_from_its_file(tmp_path):
    file = tmp_path / "plan.json"
    written = made().with_verification(plans.verification(plans.PLANS["64 GPUs"]()))
    written.to_json(file)
    assert Plan.from_json(file) == Plan.from_json(str(file)) == written


def test_other_plans_are_not_equal():
    assert made() != made(objective="memory")
    assert made() != "a plan"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "{", ["is not JSON"]),
        (lambda text: "{}", ["is no plan", "tbjax plan"]),
        (lambda text: "[]", ["is no plan"]),
        (lambda text: text.replace('"format": 1', '"format": 2'), ["format 2 is not 1"]),
        (lambda text: text.replace('"layout"', '"lay"', 1), ["unknown fields ['lay']"]),
        (lambda text: text.replace('"remat": "full"', '"remat": "some"', 1), ["remat", "'some'"]),
        (lambda text: text.replace('"fits": true', '"fits": "yes"'), ["fits", "bool", "'yes'"]),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, change, words):
    file = tmp_path / "plan.json"
    file.write_text(change(plans.make("h100:8", Layout(fsdp=8, microbatches=16), layers=8).to_json()))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        Plan.from_json(file)
    for word in [str(file), *words]:
        assert word in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"tbjax plan \.\.\. --out missing\.json"):
        Plan.from_json("missing.json")
    with pytest.raises(ValueError, match="the plan is no plan"):
        Plan.from_json("[]")


def test_the_page_is_written(tmp_path):
    file = tmp_path / "plan.html"
    made().to_html(file)
    assert file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_json_is_for_others_to_read():
    values = json.loads(made().to_json())
    assert values["layout"]["fsdp"] * values["layout"]["tp"] >= 1
    assert set(values["memory"]) >= {"parts", "host"}


# --- Verified ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that says what it is told: how many bytes are left by the layouts that it is asked about, in order."""
    asked, said = [], plans.verification(plans.PLANS["one node"]())

    def answers(*margins, cycles=0):
        told = iter(margins)

        def verify(config, workload, layout, where):
            asked.append(layout)
            program = said.programs[0]
            margin = next(told)
            if isinstance(margin, Exception):
                raise margin
            total = where.hardware.usable - margin
            sizes = {**program.bytes, "argument": 0, "output": 0, "alias": 0, "temp": total}
            changed = dataclasses.replace(program, bytes=sizes, cycles=cycles and cycles.pop())
            return dataclasses.replace(said, cluster=where, programs=(changed,))

        monkeypatch.setattr(planning, "verify", verify)
        return asked

    return answers


def test_a_verified_search_compiles_the_best_few(compiler):
    analytic = made()
    asked = compiler(1, 1, 1)
    verified = made(search="verified")
    assert asked == [analytic.layout, *(candidate.layout for candidate in analytic.candidates[:2])]
    assert verified.layout == analytic.layout
    assert verified.candidates == analytic.candidates
    assert verified.verification
    assert verified.verification.fits


def test_what_the_compiler_says_does_not_fit_is_rejected(compiler):
    analytic = made()
    compiler(-(3 << 30), 1, 1)
    verified = made(search="verified")
    assert verified.layout == analytic.candidates[0].layout
    assert verified.rejected[0].reason == "the compiler needs 3.0 GiB more than a device has"
    assert verified.rejected[0].example == analytic.layout.mesh
    assert verified.candidates == analytic.candidates[1:]


def test_it_looks_further_until_one_fits(compiler):
    analytic = made()
    asked = compiler(-1, -1, -1, -1, 1)
    assert made(search="verified").layout == analytic.candidates[3].layout
    assert len(asked) == 5


def test_where_the_compiler_lets_none_fit_its_closest_is_the_plan(compiler):
    analytic = made()
    compiler(-(5 << 30), -(2 << 30), *[-(9 << 30)] * 4)
    verified = made(search="verified")
    assert not verified.fits
    assert verified.layout == analytic.candidates[0].layout
    assert verified.missing == 2 << 30


def test_what_the_compiler_refuses_is_rejected_with_its_words(compiler):
    analytic = made()
    compiler(CompilationError("out\nof memory"), 1, 1)
    verified = made(search="verified")
    assert verified.layout == analytic.candidates[0].layout
    assert verified.rejected[0].reason == "the compiler refuses: out of memory"


def test_where_the_compiler_refuses_everything_its_words_are_raised(compiler):
    compiler(*[CompilationError("out of memory")] * 6)
    with pytest.raises(CompilationError, match="out of memory"):
        made(search="verified")


def test_the_compilers_cycles_rank_where_it_gives_them(compiler):
    analytic = made()
    compiler(1, 1, 1, cycles=[10, 30, 20])  # popped from the end
    verified = made(search="verified")
    assert verified.layout == analytic.candidates[1].layout
    assert [candidate.layout for candidate in verified.candidates[:2]] == [
        analytic.layout,
        analytic.candidates[0].layout,
    ]


def test_the_compilers_bytes_rank_where_memory_is_the_objective(compiler):
    analytic = made(objective="memory")
    compiler(1, 5, 3)
    assert made(search="verified", objective="memory").layout == analytic.candidates[0].layout


ONE_LAYOUT = {
    "pp": 1,
    "dp": 1,
    "fsdp": 2,
    "ep": 1,
    "cp": 1,
    "tp": 2,
    "strategy": "FULL_SHARD",
    "sequence_parallel": False,
    "microbatches": 2,
    "remat": "full",
    "offload": (),
}


def test_the_real_compiler_is_asked():
    tiny = dataclasses.replace(llama(2, 256), vocab_size=512)
    workload = Workload(global_batch=8, seq_len=64)
    verified = made("cpu:4", workload, tiny, search="verified", fixed=ONE_LAYOUT)
    assert verified.verification
    assert verified.verification.compiler == "cpu"
    assert verified.verification.fits
    assert verified.verification.compiled.total > 0


def test_an_unknown_search_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'deep'.*'analytic', 'verified'"):
        made(search="deep")
