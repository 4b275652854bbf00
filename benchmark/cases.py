# SPDX-License-Identifier: Apache-2.0
"""The rows of the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """Requests of one kind to one server."""

    name: str
    server: str  # plain, ceiling, proxy (in front of ceiling) or server
    protocol: str = "grpc"
    outputs: tuple[str, ...] = ("original", "segmented")
    parameters: Mapping[str, object] = field(default_factory=dict)


JPEG, PNG = ({"format": name} for name in ("jpeg", "png"))

CASES = (
    Case("plain", "plain"),
    Case("ceiling", "ceiling"),
    Case("ceiling/http", "ceiling", "http"),
    Case("ceiling/jpeg", "ceiling", outputs=("encoded",), parameters=JPEG),
    Case("ceiling/jpeg/http", "ceiling", "http", outputs=("encoded",), parameters=JPEG),
    Case("proxy", "proxy"),
    Case("proxy/http", "proxy", "http"),
    Case("proxy/jpeg", "proxy", outputs=("encoded",), parameters=JPEG),
    Case("proxy/jpeg/http", "proxy", "http", outputs=("encoded",), parameters=JPEG),
    Case("server", "server"),
    Case("server/http", "server", "http"),
    Case("server/segmented", "server", outputs=("segmented",)),
    Case("server/mask", "server", outputs=("mask",)),
    Case("server/probability", "server", outputs=("probability",)),
    Case("server/labels", "server", outputs=("labels",)),
    Case("server/jpeg", "server", outputs=("encoded",), parameters=JPEG),
    Case("server/jpeg/http", "server", "http", outputs=("encoded",), parameters=JPEG),
    Case("server/png", "server", outputs=("encoded",), parameters=PNG),
)
STAGES_ROW = "stages"  # another row: the stages without Triton
