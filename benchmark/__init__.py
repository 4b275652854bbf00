# SPDX-License-Identifier: Apache-2.0
"""Measures the server against a plain one, and against the limit of PyTriton itself; see docs/performance.md."""
