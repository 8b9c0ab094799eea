"""The pictures of the README, made by what they show: `make pictures`.

    plan.svg    what `tbjax plan` prints, as a terminal shows it
    zb-h1.svg   what `tbjax pipeline --svg` writes

No browser is needed: rich draws its own output. A test holds the files against what would be made today.
"""

import io
from pathlib import Path

from rich.console import Console

import tbjax
from tbjax.pipeline import picture
from tbjax.pipeline.schedule import named
from tbjax.pipeline.simulate import Times, simulate

FOLDER = Path(__file__).parent

PLANNED = "tbjax plan llama-2-70b-hf --hardware h100:8x8 --global-batch 512"
SCHEDULED = "tbjax pipeline --schedule zb-h1 --stages 4 --microbatches 8"

# Wide enough for no line of the report to break.
COLUMNS = 118

# Rich's own has a title bar, and a font that readers' browsers would fetch.
FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def plan() -> str:
    """The report of a plan."""
    made = tbjax.plan("llama-2-70b-hf", "h100:8x8", global_batch=512)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(f"$ {PLANNED}", markup=False)
    console.print(made)
    return console.export_svg(title="", code_format=FRAME)


def pipeline() -> str:
    """A schedule's timeline."""
    return picture.svg(simulate(named("zb-h1"), 4, 8, Times(forward=1, backward_input=1, backward_weight=1)))


if __name__ == "__main__":
    for name, text in (("plan.svg", plan()), ("zb-h1.svg", pipeline())):
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote {FOLDER / name}, {len(text) / 1e3:.0f} kB")
