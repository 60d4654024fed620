"""The one exception of pypar that isn't a Python built-in."""

from __future__ import annotations

import torch.distributed as dist


class PeerError(dist.DistBackendError):
    """A rank died, left, disagreed or did not answer in time. Says the operation, the call, the rank and the peer.

    A `RuntimeError`, and a `torch.distributed.DistError`. The group is unusable after it: every later call raises it
    again.
    """
