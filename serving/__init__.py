# SPDX-License-Identifier: Apache-2.0
"""What any PyTriton server needs in production. Knows nothing about segmentation.

The path of a request: Triton calls an :class:`~serving.instance.Instance`, which sends the request through a
:class:`~serving.channel.Channel` to a worker process. There a :class:`~serving.batcher.Batcher` groups what is waiting
and calls your stages.
"""
