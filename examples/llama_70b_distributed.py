"""Llama-2-70B from the first question to the first token: what it needs, which mesh, does it fit, load, generate.

    python examples/llama_70b_distributed.py --tiny
    python examples/llama_70b_distributed.py --hardware h100:8 --plan-only    # on any machine: plans and compiles
    python examples/llama_70b_distributed.py                                  # where 80 GB GPUs are, or a v5p slice

The plan is the program: the mesh that is priced here is the one that the weights are loaded onto.
"""

import argparse
import sys
import tempfile

import tiny


def main() -> int:
    arguments = parse_arguments()
    tiny.provide_devices()

    import tbjax
    from tbjax.compat import estimate_gpu_requirements

    with tempfile.TemporaryDirectory() as folder:
        name = tiny.written(tiny.LLAMA, folder) if arguments.tiny else arguments.model_name
        hardware = "cpu:8" if arguments.tiny else arguments.hardware
        if not arguments.tiny:
            needs = estimate_gpu_requirements(name, max_sequence_length=arguments.seq_len)
            print(f"{name}: {needs['num_gpus_required']} GPUs, {needs['memory_per_gpu_gb']:.1f} GB on each\n")

        plan = tbjax.plan(
            name,
            hardware,
            task="inference",
            global_batch=arguments.batch_size,
            seq_len=256 if arguments.tiny else arguments.seq_len,
            new_tokens=16 if arguments.tiny else 512,
        )
        print(plan)
        if arguments.plan_only:
            verification = plan.verify()
            print("the compiler agrees" if verification.fits else "the compiler says that it does not fit")
            return 0 if verification.fits else 1
        model = tbjax.load(name, mesh=plan)

    if model.tokenizer is None:
        print(f"after tokens 1, 2, 3: {model.generate([1, 2, 3], max_new_tokens=8)}")
    else:
        print(model.generate(arguments.prompt, max_new_tokens=64))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "meta-llama/Llama-2-70b-hf")
    parser.add_argument("--hardware", default="auto", help="auto, or what to plan for: h100:8, v5p:2x2x2")
    parser.add_argument("--plan-only", action="store_true", help="plan, and have the target's compiler check it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--prompt", default="The three laws of robotics are")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
