# SPDX-License-Identifier: Apache-2.0
"""The lock files match the short lists, and pin all packages with hashes."""

import re

import pytest
from conftest import ROOT

LISTS = ("requirements-uv", "requirements", "requirements-dev")


def pins(text: str) -> dict[str, set[str]]:
    """Return the versions of each package that a list pins, without extras. Some depend on the version of Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", text, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("name", LISTS)
def test_the_lock_file_agrees_with_the_short_list(name):
    wanted, locked = (pins((ROOT / f"{name}.{suffix}").read_text()) for suffix in ("in", "txt"))
    assert wanted
    assert {package: locked.get(package) for package in wanted} == wanted, "run make lock"


@pytest.mark.parametrize("name", LISTS)
def test_each_package_has_hashes_and_none_has_an_address(name):
    text = (ROOT / f"{name}.txt").read_text()
    packages = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(packages) > (0 if name == "requirements-uv" else 20)
    assert [package for package in packages if "--hash=sha256:" not in package] == []
    assert "://" not in text
    assert "index" not in text
