"""The command from outside: exit codes, files, and what it prints."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.cli import main
from loadtest.commands import COMMANDS

ROOT = Path(__file__).parents[2]

# What real time shows, a machine whose cores are taken cannot: it gets further tries.
REAL_TIME = pytest.mark.flaky(reruns=4, reruns_delay=1)


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loadtest", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listen(process: subprocess.Popen[str]) -> str:
    """The address that a server prints once it listens."""
    return process.stdout.readline().split()[-1]


@pytest.fixture(scope="module")
def url():
    with start("server", "--port", "0", "--ttft", "10ms", "--itl", "2ms") as process:
        yield listen(process)
        process.terminate()
        assert process.wait(5) == 0


def load(url: str, *words: str) -> list[str]:
    base = ["run", "--url", url, "--rate", "100", "--requests", "40", "--output", "4"]
    return [*base, "--slo", "ttft=30s,tpot=30s", *words]


# The client shares this machine with other tests, so that a run may rightly be INVALID (3).


def test_a_run_writes_all_its_reports(url, tmp_path, capsys):
    files = {name: tmp_path / f"r.{name}" for name in ("save", "csv", "html")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(load(url, *words)) in (0, 3)
    assert "requests" in capsys.readouterr().out
    report = json.loads(files["save"].read_text())
    assert report["schema"] == "motley.loadtest.run/1"
    assert report["totals"]["answered"] == 40
    rows = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert len(rows) == 40
    assert all(float(row["ttft"]) >= 0.01 and row["met"] == "1" for row in rows)
    assert "<svg" in files["html"].read_text()


@REAL_TIME
def test_json_is_all_that_is_printed_when_asked(url, capsys):
    assert main(load(url, "--json")) in (0, 3)
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["scheduled"] == 40
    assert (report["attained"], report["share"]) == (True, 1.0)
    assert report["valid"] == all(check["ok"] for check in report["checks"])


def test_a_reader_that_goes_away_is_no_error(url):
    with start(*load(url, "--json")) as process:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(10) == 141
    assert err == ""


def test_without_a_command_it_is_a_run(url, capsys):
    assert main(load(url, "--json")[1:]) in (0, 3)
    assert json.loads(capsys.readouterr().out)["schema"] == "motley.loadtest.run/1"


def test_a_missed_slo_is_a_code_of_its_own(url, capsys):
    assert main(load(url, "--slo", "ttft=1ms", "--json")) in (1, 3)
    report = json.loads(capsys.readouterr().out)
    assert [group["attained"] for group in report["classes"]] == [False]


def test_a_run_against_a_busy_client_is_invalid(url, capsys):
    """A TTFT of 10 µs allows a lag of 1 µs, which nobody keeps."""
    assert main(load(url, "--slo", "ttft=0.01ms")) == 3
    assert "INVALID" in capsys.readouterr().out


def test_ctrl_c_reports_what_was_measured_as_invalid():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = load(url, "--model", "m", "--requests", "100000", "--json")
        with start(*words) as process:
            connection, _ = silent.accept()  # the run has begun
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=10)
            connection.close()
    assert process.returncode == 3
    assert json.loads(out)["totals"]["scheduled"] > 0


@REAL_TIME
def test_a_killed_worker_is_seen_in_the_phases_and_in_the_tokens(tmp_path, capsys):
    with start("server", "--port", "0", "--ttft", "10ms", "--itl", "2ms") as process:
        url, plan = listen(process), tmp_path / "plan.toml"
        plan.write_text(
            f"recovery = 0.2\n[[fault]]\nkind = 'kill'\nat = 0.5\npid = {process.pid}\n"
        )
        code = main(
            load(url, "--duration", "1s", "--requests", "99", "--faults", str(plan), "--json")
        )
    assert code in (1, 3)
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert faults["unbroken_share"] == 1
    before, during, after = faults["phases"]
    assert (before["failed"], before["share"]) == (0, 1)
    assert during["failed"] > 0
    assert (after["share"], after["failed"]) == (0, after["scheduled"])
    assert faults["integrity"]["compared"] == before["scheduled"] + during["met"]
    assert faults["integrity"]["lost"] == 0


def test_a_stopped_worker_costs_its_time_and_no_token(tmp_path, capsys):
    with start("server", "--port", "0", "--ttft", "10ms", "--itl", "2ms") as process:
        url, plan = listen(process), tmp_path / "plan.toml"
        fault = f"kind = 'stop'\nat = 0.3\nlasts = 0.3\npid = {process.pid}\n"
        plan.write_text(f"recovery = 0.3\n[[fault]]\n{fault}")
        words = ["--slo", "ttft=100ms,tpot=100ms", "--requests", "99", "--faults", str(plan)]
        assert main(load(url, *words)) in (0, 1, 3)
        process.terminate()
    out = capsys.readouterr().out
    assert "each token once" in out
    assert "during the faults" in out


@REAL_TIME
def test_a_search_prints_each_probe_and_the_answer(url, tmp_path, capsys):
    saved, page = tmp_path / "s.json", tmp_path / "s.html"
    words = ["--url", url, "--rates", "20,40", "--least", "20", "--most", "20", "--output", "1"]
    words += ["--slo", "ttft=30s", "--save", str(saved), "--html", str(page)]
    assert main(["search", *words]) in (0, 3)
    out = capsys.readouterr().out
    assert out.count("holds") == 2
    assert "at least 40 requests/s" in out
    assert json.loads(saved.read_text())["capacity"] == 40
    assert "no rate that was tried has failed" in page.read_text()


def test_calibration_sees_the_stall_and_calls_itself_accurate_only_if_it_is(capsys):
    words = ["--rate", "50", "--duration", "1s", "--stall", "0.3s", "--json"]
    code = main(["calibrate", *words])
    found = json.loads(capsys.readouterr().out)
    error = found["stall_measured"] - found["stall_expected"]
    assert found["stall_expected"] == pytest.approx(0.15, abs=0.04)  # stall + 2 × TTFT - SLO
    assert error > -0.03  # what the stall held back was late, however busy this machine is
    exact = abs(error) <= 0.01 and found["ttft_error"]["p50"] <= 1e-3
    assert (code == 0) <= exact
    assert code in (0, 3)


def test_two_saved_runs_are_compared(url, tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path in (a, b):
        main(load(url, "--save", str(path)))
    capsys.readouterr()
    assert main(["compare", str(a), str(b)]) in (0, 1, 3)
    assert "TTFT p50" in capsys.readouterr().out
    main(["compare", str(a), str(b), "--json"])
    assert json.loads(capsys.readouterr().out)["schema"] == "motley.loadtest.comparison/1"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "--url", "nowhere", "--model", "m"], "--url"),
        (["run", "--model", "m", "--rate", "fast"], "--rate"),
        (["run", "--model", "m"], "--requests"),
        (["run", "--model", "m", "--arrivals", "ramp", "--requests", "9"], "--to-rate"),
        (["run", "--model", "m", "--slo", "quick", "--requests", "9"], "--slo"),
        (["run", "--model", "m", "--extra", "[", "--requests", "9"], "--extra"),
        (["run", "--model", "m", "--trace", "x.csv"], "--trace"),
        (["run", "--model", "m", "--requests", "9", "--plan", "no.json"], "--plan no.json"),
        (["run", "--model", "m", "--requests", "9", "--faults", "no.toml"], "--faults no.toml"),
        (["run", "--url", "http://127.0.0.1:1", "--requests", "9"], "is it up"),
        (["compare", "no.json", "no.json"], "no.json"),
        (["search", "--model", "m", "--turns", "2"], "--turns"),
    ],
)
def test_errors_name_the_option_and_exit_with_2(words, says, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [*COMMANDS, None])
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"] if name else ["--help"])
    assert ended.value.code == 0
    assert f"motley bench {name}" in capsys.readouterr().out or name is None


def test_presets_and_the_schema_are_printed(capsys):
    assert main(["presets"]) == 0
    assert "distserve-chat-13b" in capsys.readouterr().out
    assert main(["presets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mlperf-llama2-70b"]["rule"] == "each"
    assert main(["schema"]) == 0
    assert "motley.loadtest.run/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"), [("p.json", '{"cost_per_hour": 3.6}'), ("p.toml", "cost_per_hour = 3.6")]
)
def test_a_plans_cost_becomes_the_cost_of_tokens(url, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    main(load(url, "--plan", str(tmp_path / name)))
    assert "cost per million output tokens" in capsys.readouterr().out


def test_the_live_view_shows_on_a_terminal_only(url):
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", *load(url, "--json")][:-1],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other end has closed
                break
            seen += piece
        assert process.wait(10) in (0, 3)
    os.close(master)
    assert b"SLO met" in seen
