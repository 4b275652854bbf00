# SPDX-License-Identifier: Apache-2.0
"""What starts servers for demonstrations, tests and benchmarks, and what trains the demonstration weights."""
