"""What the commands share."""

import logging

import pytest
import typer

from tbjax.cli import app
from tbjax.terminal import parse_mesh, print_json, provide_cpu_devices, readable_errors, run, working


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        (None, None),
        ("auto", None),
        ("1,4,2", (1, 4, 2)),
        (" 1, -1, 2 ", (1, -1, 2)),
        ("ep=4,tp=2", {"ep": 4, "tp": 2}),
    ],
)
def test_a_mesh_is_read_as_users_write_it(text, mesh):
    assert parse_mesh(text) == mesh


@pytest.mark.parametrize("text", ["", "4", "1,4", "a,b,c", "tp", "tp=x", "1,tp=2,3"])
def test_what_is_no_mesh_is_a_usage_error_with_an_example(text):
    with pytest.raises(typer.BadParameter, match="1,4,2"):
        parse_mesh(text)


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, RuntimeError, TypeError])
def test_an_expected_error_is_one_paragraph_and_exit_code_1(error, capsys):
    with pytest.raises(typer.Exit) as exited, readable_errors(debug=False):
        raise error("config.json:\n  [field] is wrong")
    assert exited.value.exit_code == 1
    assert capsys.readouterr().err == "error: config.json: [field] is wrong\n"


PLAN = ("plan", "smollm2-135m", "--hardware", "h100:8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*PLAN, "--task", "serve"), "Invalid value for '--task': 'serve' is not one of 'train', 'inference'."),
        ((*PLAN, "--tp", "0"), "Invalid value for '--tp': '0' should be greater than or equal to 1."),
        ((*PLAN, "--mesh", "4"), "--mesh '4': give dp,fsdp,tp (as 1,4,2), axes by name (as ep=4,tp=2) or auto."),
        (("plan", "smollm2-135m"), "Missing option '--hardware'."),
        (("generate", "model"), "what is to be continued? Give --prompt, --prompts or --chat."),
        (("verify", "plan.json", "--fast"), "No such option: --fast."),
    ],
)
def test_a_command_line_that_is_not_understood_is_told_in_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tbjax", *arguments])
    with pytest.raises(SystemExit) as exited:
        run(app, "tbjax")
    assert exited.value.code == 2
    assert capsys.readouterr() == ("", f"error: {said} See `tbjax {arguments[0]} --help`.\n")


def test_a_command_without_arguments_shows_its_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tbjax"])
    with pytest.raises(SystemExit) as exited:
        run(app, "tbjax")
    shown = capsys.readouterr()
    assert exited.value.code == 2
    assert "Exit codes" in shown.out + shown.err
    assert "error" not in shown.err


def test_debug_lets_the_traceback_through():
    with pytest.raises(ValueError, match="wrong"), readable_errors(debug=True):
        raise ValueError("wrong")


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), readable_errors(debug=False):
        raise KeyError("tp")


def test_work_is_shown_on_a_terminal_and_nowhere_else(capsys, monkeypatch):
    with working("compiling"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    for quiet in (False, True):
        with working("compiling", quiet=quiet):
            pass
        output, errors = capsys.readouterr()
        assert not output
        assert ("compiling ..." in errors) is not quiet


def test_json_is_a_line_of_standard_output(capsys):
    print_json({"text": "é"})
    assert capsys.readouterr() == ('{"text": "é"}\n', "")


def test_an_exit_is_not_an_error(capsys):
    with pytest.raises(typer.Exit), readable_errors(debug=False):
        raise typer.Exit(0)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "count"), [((2, 2, 2), "8"), ({"ep": 4, "tp": 2}, "8"), ((1, -1, 2), None), ((1, 1, 1), "1")]
)
def test_the_cpu_stands_in_for_a_mesh_whose_size_is_known(mesh, count, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    environment = {}
    monkeypatch.setattr("os.environ", environment)
    provide_cpu_devices(mesh)
    assert environment.get("JAX_NUM_CPU_DEVICES") == count


def test_a_user_who_has_chosen_the_devices_is_left_alone(monkeypatch):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    monkeypatch.setattr("os.environ", environment)
    provide_cpu_devices((2, 2, 2))
    assert "JAX_NUM_CPU_DEVICES" not in environment


def test_warnings_are_printed_as_errors_are_and_once(capsys):
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        with readable_errors(debug=False):
            logging.getLogger("interop.source").warning("%s: [the hub] did not give it", "name")
            logging.getLogger("tbjax").info("not of note")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "warning: name: [the hub] did not give it\n"
    assert logging.getLogger("tbjax").propagate
    assert not logging.getLogger("tbjax").handlers
