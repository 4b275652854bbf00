# SPDX-License-Identifier: Apache-2.0
"""The benchmark, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, get, processes_of, run_python, wait_for

from benchmark.report import plot, tables
from tools.launch import free_ports

PAGE = (ROOT / "docs" / "performance.md").read_text()


def test_the_benchmark_measures_servers_over_both_protocols_and_draws_the_figures(tmp_path):
    output = tmp_path / "benchmark.json"
    rows = ["ceiling", "server/jpeg/http"]
    server = "server.py --weights demo --instances 1 --max-batch-size 1 --input-size 64"
    quickly = ["--device", "cpu", "--server", server, "--concurrency", 1, "--rounds", 1, "--seconds", 0.5]
    done = run_python("-m", "benchmark", "--rows", *rows, *quickly, "--output", output)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [row["name"] for row in report["rows"]] == rows
    for row in report["rows"]:
        assert row["photos"] > 0
        assert row["errors"] == 0
        assert row["response_bytes"] > 10_000
        kinds = {"main", "frontend", "worker", "tritonserver", "stubs", "helpers"}
        assert row["server_cpu_ms_by_process"].keys() <= kinds
    assert "| server/jpeg/http | http | encoded | 1 |" in done.stdout

    plot(report, tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert tables(report) == done.stdout.strip()


def test_the_plain_server_starts_with_the_command_in_the_documentation():
    (command,) = (line.split() for line in PAGE.splitlines() if line.startswith("    python -m benchmark.plain "))
    http, grpc, metrics = free_ports()
    command = [sys.executable, *command[1:-1], str(http)]
    # The other ports are the default ones, which another server may have.
    ports = {f"PYTRITON_TRITON_CONFIG_{name}_PORT": str(port) for name, port in (("GRPC", grpc), ("METRICS", metrics))}
    with (
        tempfile.TemporaryDirectory(prefix="pytriton-") as home,
        subprocess.Popen(command, cwd=ROOT, env=os.environ | ports | {"PYTRITON_HOME": home}) as process,
    ):
        try:
            wait_for(lambda: is_ready(http) or process.poll() is not None, timeout_s=60)
            assert process.poll() is None
        finally:
            process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert list(Path(home).iterdir()) == []


@pytest.mark.parametrize("signal_name", ["TERM", "INT"])
def test_an_interrupted_benchmark_leaves_nothing_behind(tmp_path, signal_name):
    rows = ["--rows", "plain", "ceiling", "--device", "cpu", "--rounds", "100"]
    command = ["timeout", "-s", signal_name, "20", sys.executable, "-m", "benchmark", *rows]
    with tempfile.TemporaryDirectory(prefix="pytriton-") as home:
        environment = os.environ | {"PYTRITON_HOME": home}
        done = subprocess.run([*command, "--output", tmp_path / "figures.json"], cwd=ROOT, env=environment, check=False)
        assert done.returncode == 124  # the status of timeout
        wait_for(lambda: processes_of(home) == [])  # helpers of Python and Triton end last
        assert list(Path(home).iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def is_ready(port: int) -> bool:
    try:
        return get(port, "/v2/models/ResNet101/ready") is not None
    except OSError:
        return False


def test_a_server_that_does_not_start_ends_the_benchmark_with_a_sentence():
    done = run_python(
        "-m", "benchmark", "--rows", "server", "--concurrency", 1, "--device", "cpu", "--server", "server.py --nonsense"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "benchmark: server: the server ended with status 2; its log says why"


def test_an_unknown_row_is_rejected_with_the_names_of_the_rows():
    done = run_python("-m", "benchmark", "--rows", "nonsense")
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
