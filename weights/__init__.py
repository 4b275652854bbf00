# SPDX-License-Identifier: Apache-2.0
"""Loads the network's weights; includes the demonstration weights."""
