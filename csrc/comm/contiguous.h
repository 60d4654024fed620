// One tensor of a whole host, of which every rank gave a part: see contiguous.cpp.
#pragma once

#include <string>
#include <vector>

#include <ATen/ATen.h>

namespace pypar {

// Collective over the group, all of whose ranks share memory. shard_bytes: what each rank gives, whole pages, the same
// list on every rank. Returns the shards in rank order as uint8 [sum of shard_bytes], zero at first. Throws ValueError
// for sizes that don't fit; PeerError where ranks are on other hosts, disagree or die.
at::Tensor contiguous_shards(const std::string& group_name, const std::vector<int64_t>& shard_bytes);

}  // namespace pypar
