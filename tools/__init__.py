# SPDX-License-Identifier: Apache-2.0
"""Commands that start servers for demonstrations, tests and benchmarks, and train the demonstration weights."""
