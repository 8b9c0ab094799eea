"""Load a model over many devices in the spelling of NeMo AutoModel, with the flags of its example.

    python examples/load_distributed.py --tiny --tp-size 2 --dp-size 4
    python examples/load_distributed.py --model-name meta-llama/Llama-3.1-8B --tp-size 2 --dp-size 4
    python examples/load_distributed.py --model-name meta-llama/Llama-3.1-8B --tp-size 2 --use-device-mesh

No launcher is needed on one machine: one process drives all of its devices.
"""

import argparse
import sys
import tempfile

import tiny


def main() -> int:
    arguments = parse_arguments()
    tiny.provide_devices()

    from tbjax.compat import AutoModelForCausalLM, init_device_mesh

    sizes = {"tp_size": arguments.tp_size, "cp_size": arguments.cp_size, "pp_size": arguments.pp_size}
    with tempfile.TemporaryDirectory() as folder:
        name = tiny.written(tiny.LLAMA, folder) if arguments.tiny else arguments.model_name
        if arguments.use_device_mesh:
            mesh = init_device_mesh(
                "cuda",
                mesh_shape=(arguments.pp_size, 1, arguments.dp_size or 1, arguments.cp_size, arguments.tp_size),
                mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"),
            )
            model = AutoModelForCausalLM.from_pretrained(name, device_mesh=mesh)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, distributed={**sizes, "dp_size": arguments.dp_size})
    print(model.show_sharding())
    if model.tokenizer is None:
        print(f"after tokens 1, 2, 3: {model.generate([1, 2, 3], max_new_tokens=8)}")
    else:
        print(f"The capital of France is{model.generate('The capital of France is', max_new_tokens=8)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "meta-llama/Llama-3.1-8B")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallel: layers are split")
    parser.add_argument("--cp-size", type=int, default=1, help="context parallel: sequences are split")
    parser.add_argument("--pp-size", type=int, default=1, help="pipeline parallel: the depth is split")
    parser.add_argument("--dp-size", type=int, default=0, help="data parallel, weights sharded; 0: what is left")
    parser.add_argument("--use-device-mesh", action="store_true", help="name every axis rather than sizes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
