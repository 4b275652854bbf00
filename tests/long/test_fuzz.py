# SPDX-License-Identifier: Apache-2.0
"""Each hostile photo gets its own pixels or one sentence, and the server keeps serving without growing.

FUZZ in the environment sets the number of photos; the default is 4,000. tests/served has the short form.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
from conftest import decode, encode, running_server, sample
from fuzzing import send_hostile_photos
from hostile_photos import FORMATS

COUNT = int(os.environ.get("FUZZ", "4000"))
CLIENTS = 4


@pytest.mark.timeout(120 + COUNT // 10)
def test_each_hostile_photo_gets_its_own_pixels_or_one_sentence(tmp_path):
    outcomes, memory = Counter(), []
    # A separate server, so that nothing else changes its memory.
    with running_server(tmp_path / "log", "--weights", "demo") as server, ThreadPoolExecutor(CLIENTS) as pool:
        # Heaps fill up at first, so memory is compared from halfway on.
        for numbers in (range(COUNT // 2), range(COUNT // 2, COUNT)):
            memory.append(server.memory().total())
            shares = [numbers[client::CLIENTS] for client in range(CLIENTS)]
            outcomes += Counter(chain.from_iterable(pool.map(send_hostile_photos, [server] * CLIENTS, shares)))
        memory.append(server.memory().total())
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:6d} {outcome}")  # pytest -rP shows it
        print("the server's memory at the start, halfway and at the end, MB:", *(round(size / 1e6) for size in memory))
        assert outcomes.total() == COUNT
        assert not [outcome for outcome in outcomes if outcome.startswith("NOT")]
        assert {f"{file_format} processed: original" for file_format in FORMATS} < set(outcomes)
        # tritonserver keeps 1.4 KB of each failed request.
        assert memory[2] - memory[1] < 2e6 * len(server.family()) + 3000 * COUNT / 2
        assert server.process.poll() is None
        assert "Traceback" not in server.log.read_text()
        whole = encode(sample("cat", (120, 80)), "PNG")
        assert (server.connect("http").infer(whole)["original"][0] == decode(whole)).all()
