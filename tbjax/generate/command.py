"""`tbjax generate`: text from a model, on the command line.

    tbjax generate MODEL --prompt "The capital of France is"
    tbjax generate MODEL --chat --stream --mesh 1,1,8          a conversation, a line at a time
    tbjax generate MODEL --prompts questions.jsonl --json      an answer to each line of a file

A file of prompts is text, a prompt on each line; or, with the ending .jsonl, a JSON object on each line, with a text in
"prompt" or a conversation in "messages". With --json each answer is a line of JSON on standard output; everything else
goes to standard error.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from interop.convert import Dtype, asking_about_pickles
from tbjax.quantize.rules import Named
from tbjax.terminal import Debug, Mesh, Revision, TrustPickle, join_hosts, parse_mesh, readable_errors, working

_SAMPLING, _OUTPUT = "Sampling", "Output"

# Prompts of a file that are answered together: enough to use a device well, few enough to see answers soon.
BATCH = 32


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, or .gguf file.")],
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; with --chat, the message to answer.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file of prompts: lines of text, or .jsonl.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template; without --prompt, converse.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="What a conversation begins with, for the model alone.")] = None,
    mesh: Mesh = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, show_default="the model's, or 128", help="Stop after so many tokens.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given more than once.")] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            rich_help_panel=_SAMPLING,
            show_default="the model's",
            help="By chance (so with --temperature, --top-k, --top-p or --min-p), or the best (with --temperature 0).",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=_SAMPLING, help="Under 1: safer; 0: greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING, help="Among so many tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(rich_help_panel=_SAMPLING, help="Among the likeliest with this share.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(rich_help_panel=_SAMPLING, help="Among those at least so likely beside the best.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(rich_help_panel=_SAMPLING, help="Over 1: seldom again what there was.")
    ] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_SAMPLING, help="Answers to each prompt.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, rich_help_panel=_SAMPLING, show_default="random", help="Of the first prompt.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", rich_help_panel=_OUTPUT, help="Print the text as it is written.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print each answer as a line of JSON.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="No progress line.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the weights; else they are as config.json says.")] = None,
    quantization: Annotated[Named | None, typer.Option(help="Keep the weights in 8 or 4 bits.")] = None,
    revision: Revision = None,
    trust_pickle: TrustPickle = False,
    debug: Debug = False,
) -> None:
    """Continue texts, or answer messages."""
    if prompt is not None and prompts is not None:
        raise typer.BadParameter("--prompt and --prompts: one of them says what is asked.")
    if prompt is None and prompts is None and not chat:
        raise typer.BadParameter("what is to be continued? Give --prompt, --prompts or --chat.")
    if system is not None and not chat:
        raise typer.BadParameter("--system is of a conversation: give --chat too.")
    if stream and (as_json or prompts is not None or (num_return_sequences or 1) > 1):
        raise typer.BadParameter("--stream shows one answer as it is written: leave out --json, --prompts and several.")
    shape = parse_mesh(mesh)
    drawn = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    do_sample = sampled(do_sample, {option: value for option, value in drawn.items() if value is not None})
    options = {
        "max_new_tokens": max_new_tokens,
        "stop_strings": stop or None,
        "do_sample": do_sample,
        "temperature": temperature or None,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "num_return_sequences": num_return_sequences,
        "seed": seed,
    }
    with readable_errors(debug=debug):
        questions = None if prompts is None else list(_questions(prompts, chat, system))
        join_hosts(shape, quiet=quiet)
        import jax

        import tbjax

        loading: dict[str, Any] = {"dtype": dtype, "revision": revision, "progress": not quiet}
        loading["quantization"] = quantization
        loaded = asking_about_pickles(
            lambda trusted: tbjax.load(model, shape, trust_pickle=trusted, **loading), trust_pickle
        )
        speaks = jax.process_index() == 0
        if questions is None and prompt is None:
            _converse(loaded, system, options, stream=stream, as_json=as_json, quiet=quiet)
        elif questions is None:
            shown = {"stream": stream, "as_json": as_json, "speaks": speaks, "quiet": quiet}
            _answer(loaded, [_question(prompt, chat, system)], options, **shown)
        else:
            for start in range(0, len(questions), BATCH):
                part = questions[start : start + BATCH]
                own = options if seed is None else options | {"seed": seed + start}
                _answer(loaded, part, own, stream=False, as_json=as_json, speaks=speaks, quiet=quiet)


def sampled(asked: bool | None, given: Mapping[str, float]) -> bool | None:
    """Whether tokens are drawn: as was asked for, or where an option was given that means nothing otherwise.

    A temperature of 0 asks for the best, as everywhere; what draws takes none (`tbjax.generate.settings`).
    """
    best = "--greedy" if asked is False else "--temperature 0" if given.get("--temperature") == 0 else None
    if best is None:
        return True if given else asked
    chance = ["--sample"] if asked else []
    chance += [option for option, value in given.items() if (option, value) != ("--temperature", 0)]
    if chance:
        raise typer.BadParameter(f"{best} leaves nothing to chance, and {chance[0]} does: leave out one of them.")
    return False


def _question(text: Any, chat: bool, system: str | None) -> Any:
    if not chat:
        return text
    begun = [] if system is None else [{"role": "system", "content": system}]
    return [*begun, {"role": "user", "content": text}] if isinstance(text, str) else [*begun, *text]


def _questions(file: Path, chat: bool, system: str | None) -> Iterator[Any]:
    """The prompts of a file."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield _question(line, chat, system)
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}.") from error
        asked = record.get("messages", record.get("prompt")) if isinstance(record, dict) else None
        if not isinstance(asked, str | list) or not asked:
            raise ValueError(f'{file}, line {number}: an object with a "prompt" or "messages" is needed.')
        yield _question(asked, chat or isinstance(asked, list), system)


def _answer(
    model: Any, questions: list[Any], options: dict[str, Any], *, stream: bool, as_json: bool, speaks: bool, quiet: bool
) -> list[str]:
    """Ask together, and print the answers. All processes ask, and one `speaks`."""
    if stream:
        pieces = []
        for piece in model.generate(questions[0], stream=True, **options):
            pieces.append(piece)
            _print(piece, speaks, end="")
        _print("", speaks)
        return ["".join(pieces)]
    what = "an answer" if len(questions) == 1 else f"answers to {len(questions)} prompts"
    with working(f"generating {what}", quiet=quiet or not speaks):
        answers = model.generate(questions, return_dict_in_generate=True, **options)
    each = len(answers) // len(questions)
    for number, answer in enumerate(answers):
        line = answer.text
        if as_json:
            values = {"prompt": questions[number // each], "text": answer.text, "tokens": len(answer.tokens)}
            likely = {"log_probability": sum(answer.log_probabilities), "end": answer.end}
            line = json.dumps(values | likely, ensure_ascii=False)
        _print(line, speaks)
    return [answer.text for answer in answers]


def _converse(
    model: Any, system: str | None, options: dict[str, Any], *, stream: bool, as_json: bool, quiet: bool
) -> None:
    """Each line of standard input is a message, and the answer is part of what the next is asked after."""
    import jax

    if jax.process_count() > 1:
        raise ValueError("a conversation is read from one terminal, and this job has several processes: give --prompt.")
    said: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    shown = sys.stdin.isatty()
    while True:
        if shown:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        said.append({"role": "user", "content": line.strip()})
        answer = _answer(model, [said], options, stream=stream, as_json=as_json, speaks=True, quiet=quiet)[0]
        said.append({"role": "assistant", "content": answer})


def _print(text: str, speaks: bool, end: str = "\n") -> None:
    if speaks:
        sys.stdout.write(text + end)
        sys.stdout.flush()
