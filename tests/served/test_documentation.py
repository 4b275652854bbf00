# SPDX-License-Identifier: Apache-2.0
"""The examples of README and docs work as the text around them says."""

import io
import json
import re
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import PHOTO, ROOT, Server, decode, psnr
from PIL import Image
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

import client
import server as lesson


def example(page: str, after: str, server: Server) -> str:
    """Return the first indented block below a line of a page, for this server."""
    text = (ROOT / page).read_text().partition(f"{after}\n")[2]
    block = re.search(r"(^    .*\n|^\n)+", text[text.index("\n    ") + 1 :], re.MULTILINE)[0]
    code = re.sub(r"^    ", "", block, flags=re.MULTILINE)
    return code.replace("127.0.0.1:8000", f"127.0.0.1:{server.http_port}").replace(
        "127.0.0.1:8001", f"127.0.0.1:{server.grpc_port}"
    )


@pytest.mark.parametrize(
    ("page", "after"), [("README.md", "## Your own client"), ("docs/protocol.md", "## Python over gRPC")]
)
def test_the_python_clients_get_the_person(server, page, after, tmp_path, monkeypatch):
    (tmp_path / "images").symlink_to(ROOT / "images")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example(page, after, server), names)
    assert names["segmented"].shape == (512, 512, 3)
    assert 0.3 < names["segmented"].any(axis=2).mean() < 0.6


def run(command: str, folder: Path) -> str:
    """Run a command of the documentation, and return its output."""
    (folder / "images").symlink_to(ROOT / "images")
    return subprocess.run(["bash", "-euc", command], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_shortest_curl_command_gets_both_raw_outputs_after_a_line_of_json(server, tmp_path):
    head = run(example("docs/protocol.md", "With all defaults:", server), tmp_path)
    length = int(re.search(r"(?i)inference-header-content-length: (\d+)", head)[1])
    response = (tmp_path / "response.bin").read_bytes()
    names = [output["name"] for output in json.loads(response[:length])["outputs"]]
    assert set(names) == {"original", "segmented"}
    outputs = dict(zip(names, np.frombuffer(response[length:], np.uint8).reshape(2, 512, 512, 3), strict=True))
    assert 0.3 < outputs["segmented"].any(axis=2).mean() < 0.6
    assert psnr(outputs["original"], decode(PHOTO)) > 40


def test_a_curl_command_ends_with_a_transparent_png_on_disk(server, tmp_path):
    run(example("docs/protocol.md", "A PNG on disk, with a transparent background:", server), tmp_path)
    picture = Image.open(tmp_path / "cut_out.png")
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGBA", (512, 512))
    assert 0.3 < (np.asarray(picture)[..., 3] == 255).mean() < 0.6


def test_another_grpc_client_needs_the_documented_option_for_large_responses(server):
    file = io.BytesIO()
    Image.open(io.BytesIO(PHOTO)).resize((900, 900)).save(file, "JPEG")
    photo = file.getvalue()
    request = ModelInferRequest(model_name="ResNet101", raw_input_contents=[photo])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, len(photo)])
    option = re.search(r"`options=(\[.*?\])`", (ROOT / "docs" / "protocol.md").read_text())[1]
    address = f"127.0.0.1:{server.grpc_port}"
    with grpc.insecure_channel(address) as default, grpc.insecure_channel(address, options=eval(option)) as larger:
        with pytest.raises(grpc.RpcError) as error:
            GRPCInferenceServiceStub(default).ModelInfer(request)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        response = GRPCInferenceServiceStub(larger).ModelInfer(request)
    assert sum(map(len, response.raw_output_contents)) == 2 * 3 * 900 * 900


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_links_of_the_documentation_lead_somewhere():
    links = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")):
        for path, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{path} in {page.name}"
            assert not anchor or anchor in anchors(target), f"{path}#{anchor} in {page.name}"
            links += 1
    assert links > 50


def test_the_log_lines_that_the_documentation_quotes_exist():
    code = "".join(path.read_text() for path in (ROOT / "serving").glob("*.py"))
    lines = [line for page in ROOT.glob("docs/*.md") for line in re.findall(r"`(stopping: \w[^`]*)`", page.read_text())]
    assert len(lines) > 5
    for line in lines:
        for part in re.split(r"\d+", line):  # seconds
            assert part in code, line


def test_the_table_of_promises_names_tests_that_exist():
    names = re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(names) > 50
    path = ""
    for file, name in names:
        path = file or path  # several tests of one file have its name once
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("parse_options", [client.parse_options, lesson.parse_options])
def test_the_readme_lists_each_option(parse_options, capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    options = set(re.findall(r"(--[a-z-]+[a-z])", capsys.readouterr().out)) - {"--help"}
    readme = (ROOT / "README.md").read_text()
    assert {option for option in options if f"`{option}" not in readme} == set()
