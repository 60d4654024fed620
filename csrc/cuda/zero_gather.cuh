// Shards of parameters to full ones: the kernels of all_gather.cuh, on shards of any sizes.
//
// By copy engines the full parameters are used where they arrive, in the first slot of a channel of their own:
// zero_gather_start, then, on the computing stream, zero_gather_wait, the layers, zero_gather_free. Several channels
// are the slots of prefetching.
#pragma once

#include "cuda/all_gather.cuh"
