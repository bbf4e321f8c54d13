"""The command: what an operator may write wrongly, and what it says then."""

from __future__ import annotations

import pytest

import motley


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "fake", "--port", "65536"], "65536 is not a port"),
        (["serve", "fake", "--port", "-1"], "-1 is negative"),
        (["serve", "fake", "--cluster", "8100"], "'8100' is not HOST:PORT"),
        (["worker", "fake", "--join", "host:70000"], "70000 is not a port"),
        (["worker", "fake", "--join", ":8100"], "':8100' is not HOST:PORT"),
        (["worker", "fake"], "--join"),
        (["dance"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        motley.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "fake:pages=1"], "motley: fake:pages=1: "),
        (["serve", "fake", "fake:tokens=2"], "two models are called 'fake'"),
    ],
)
def test_what_the_operator_must_change_ends_with_code_2(
    capsys, monkeypatch, tmp_path, arguments, said
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert motley.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_secret_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("MOTLEY_SECRET", "of this test")
    assert motley.main(["secret"]) == 0
    assert capsys.readouterr().out == "of this test\n"
