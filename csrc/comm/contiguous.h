// One tensor of a whole host, of which every rank gave a part: see contiguous.cpp.
#pragma once

#include <string>
#include <vector>

#include <ATen/ATen.h>

namespace pypar {

// Collective over the group, all of whose ranks share memory. Part i, of bytes[i] in whole pages, is memory that rank
// owners[i] gives; the same lists on every rank. Returns the parts in their order as uint8 [sum of bytes], zero at
// first. Throws ValueError for lists that don't fit; PeerError where ranks are on other hosts, disagree or die.
at::Tensor contiguous_parts(const std::string& group_name, const std::vector<int64_t>& owners,
                            const std::vector<int64_t>& bytes);

// Gives the memory of a part back, on all ranks: it is zero until somebody writes there. Nobody uses it at the time.
void give_back_pages(const at::Tensor& part);

}  // namespace pypar
