"""Weights in 8 or 4 bits, for models that only serve.

    model = tbjax.load("meta-llama/Llama-2-70b-hf", mesh=(1, 1, 8), quantization="int8")

`rules` says which weights are kept in how many bits, `numbers` how a float becomes so few, `weight` what stands in the
model in a weight's place and how it multiplies, `convert` turns models into such ones and back. While a checkpoint is
loaded the same is done to each slice on its way in (`interop.quantized`), so that no model need be held in full.
"""

from tbjax.quantize.rules import RULES, Encoding, Recipe, recipe

__all__ = ["RULES", "Encoding", "Recipe", "recipe"]
