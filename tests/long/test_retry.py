# SPDX-License-Identifier: Apache-2.0
"""A start of Triton that fails because its instances miss each other, as on a busy machine."""

from conftest import PHOTO, Server, decode, patched_toy

from serving.triton import START_ATTEMPTS

MISS_EACH_OTHER = """
from pytriton.models.model import Model

healthy, errors, starts = Model.get_proxy_model_files, {errors}, []

def proxy_files(self):  # what the instances run, of which the second asks the first where its memory is
    files = healthy(self)
    starts.append(self)
    if len(starts) <= len(errors):
        fail = "def get_config_from_handshake_server(_): raise " + errors[len(starts) - 1]
        files["file:1/communication.py"] += fail.encode()
    return files

Model.get_proxy_model_files = proxy_files
"""


def test_instances_that_miss_each_other_are_started_again(tmp_path):
    errors = ["ConnectionRefusedError(111, 'Connection refused')", "BlockingIOError(11, 'temporarily unavailable')"]
    assert len(errors) < START_ATTEMPTS
    script = patched_toy(tmp_path, MISS_EACH_OTHER.format(errors=errors))
    with Server(tmp_path / "log", "--instances", "2", script=script, model_name="Toy") as server:
        server.wait_until_ready()
        assert server.log.read_text().count("; --verbose shows its log; trying again") == 2
        answer = server.connect("grpc").infer(PHOTO)
        assert (answer["inverted"][0] == 255 - decode(PHOTO)).all()
        assert server.stop() == 0
        assert server.left_behind() == []
