# SPDX-License-Identifier: Apache-2.0
"""The weights of the network: how they are loaded, and the demonstration weights."""
