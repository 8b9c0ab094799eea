"""Two real processes with four devices each load a model, each reading its own part, and write it back together."""

import json
import math

import numpy as np
import pytest

from interop.readers import open_checkpoint
from tbjax.api import abstract
from tests import by_table, processes, tiny

# By name of the folder: the model, the mesh, and the share of the weights (norms aside) that each process holds.
RUNS = {
    "fsdp": ("llama", (1, 4, 2), 0.5),  # the processes have different halves of the fsdp axis
    "replicas": ("llama", (2, 2, 2), 1.0),  # each is one of the two replicas
    "experts": ("mixtral", {"ep": 4, "tp": 2}, 0.5),
    "stages": ("llama-odd-vocabulary", {"pp": 2, "fsdp": 2, "tp": 2}, None),  # layers cut in two, ends held by both
}

SCRIPT = """
import json
from pathlib import Path
import numpy as np
from interop.export import export
from interop.load import load_parameters
from interop.readers import open_checkpoint
from tbjax.api import abstract
from tests import by_table, tiny

results = {}
for run, (name, mesh) in json.loads(sys.argv[5]).items():
    folder = Path(sys.argv[4]) / run
    case = tiny.BY_NAME[name]
    config = tiny.our_config(case)
    reports = []
    with open_checkpoint(folder / "in") as checkpoint:
        model = load_parameters(abstract(config, mesh), config, case.family, checkpoint, report=reports.append)
    expected = by_table.read(config, tiny.tensors(case))
    for path, variable in by_table.paths(model).items():
        for shard in variable.get_value().addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index])
    options = {"config_json": tiny.hf_config(case).to_dict(), "max_shard_bytes": 30_000}
    export(model, config, case.family, folder / "out", **options)
    try:
        export(model, config, case.family, folder / "out", **options)
    except OSError as error:
        results[run] = {"bytes_read": reports[0].bytes_read, "refusal": str(error)}
    large = jax.tree.map(lambda array: 1e6 * array, model)
    try:
        export(large, config, case.family, folder / "half", dtype="float16", **options)
    except (OSError, ValueError) as error:
        results[run]["overflow"] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for run, (name, _, _) in RUNS.items():
        tiny.save(tiny.BY_NAME[name], folder / run / "in")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each of the two processes did: bytes read, and how a second export was refused, by run."""
    runs = json.dumps({run: (name, mesh) for run, (name, mesh, _) in RUNS.items()})
    return [json.loads(output.splitlines()[-1]) for output in processes.run(SCRIPT, folder, runs)]


def bytes_held(case, mesh, process):
    """By arithmetic: the float32 weights on the four devices of one process, without repetition and padding."""
    config = tiny.our_config(case)
    total = 0
    for leaf in by_table.paths(abstract(config, mesh)).values():
        struct = leaf.get_value()
        real = (config.vocab_size, *struct.shape[1:]) if "vocab" in leaf.dims else struct.shape
        parts = {
            tuple(part.indices(size)[:2] for part, size in zip(index, struct.shape, strict=True))
            for device, index in struct.sharding.devices_indices_map(struct.shape).items()
            if device.id // 4 == process
        }
        for bounds in parts:
            total += 4 * math.prod(max(0, min(stop, n) - start) for (start, stop), n in zip(bounds, real, strict=True))
    return total


@pytest.mark.parametrize("run", RUNS)
def test_each_process_reads_what_its_devices_hold(run, results):
    name, mesh, share = RUNS[run]
    case = tiny.BY_NAME[name]
    read = [result[run]["bytes_read"] for result in results]
    assert read == [bytes_held(case, mesh, process) for process in (0, 1)]
    sizes = [value.nbytes for value in tiny.tensors(case).values()]
    vectors = sum(value.nbytes for value in tiny.tensors(case).values() if value.ndim == 1)
    assert sum(read) >= sum(sizes)
    if share is not None:
        # The norms are replicated, so both read them.
        assert all(share * sum(sizes) <= size <= share * sum(sizes) + vectors for size in read)


@pytest.mark.parametrize("run", RUNS)
def test_both_write_one_checkpoint(run, results, folder):
    tensors = tiny.tensors(tiny.BY_NAME[RUNS[run][0]])
    with open_checkpoint(folder / run / "out") as checkpoint:
        assert checkpoint.keys() == tensors.keys()
        assert len({tensor.file for tensor in checkpoint.values()}) > 1
        for tensor in checkpoint.values():
            np.testing.assert_array_equal(tensor.read(), tensors[tensor.name])


@pytest.mark.parametrize("run", RUNS)
def test_what_the_first_process_cannot_write_is_raised_in_both(run, results):
    assert all("is not empty" in result[run]["refusal"] for result in results)


@pytest.mark.parametrize("run", RUNS)
def test_a_tensor_that_the_first_process_cannot_convert_is_named_in_both(run, results, folder):
    """Although the others have no more than taken part in gathering it."""
    name = "tensor 'model.embed_tokens.weight' cannot be written as float16"
    assert all(name in result[run]["overflow"] for result in results)
    assert not (folder / run / "half").exists()
