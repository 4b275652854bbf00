# SPDX-License-Identifier: Apache-2.0
"""Measures the server against a plain one and against what PyTriton itself can carry; see docs/performance.md."""
