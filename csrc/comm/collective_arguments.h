// What the collectives of the process group do with their arguments. Internal to comm/.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/Utils.hpp>

#include "comm/tensors.h"
#include "comm/work.h"

namespace pypar {

inline const at::Tensor& only(const char* what, const std::vector<at::Tensor>& tensors) {
  if (tensors.size() != 1) {
    refuse(std::string(what) + " requires a single-element tensor list, got " + std::to_string(tensors.size()));
  }
  return tensors[0];
}

inline const std::vector<at::Tensor>& only_list(const char* what, const char* name, const TensorLists& lists,
                                                int world) {
  if (lists.size() != 1 || lists[0].size() != static_cast<size_t>(world)) {
    refuse(std::string(what) + ": " + name + " must be one list of " + std::to_string(world) +
           " tensors, one per rank; got " +
           (lists.size() == 1 ? std::to_string(lists[0].size()) : std::to_string(lists.size()) + " lists"));
  }
  return lists[0];
}

inline void check_numel(const char* what, const char* name, const at::Tensor& tensor, int64_t expected) {
  if (tensor.numel() != expected) {
    refuse(std::string(what) + ": " + name + " has " + std::to_string(tensor.numel()) + " elements (shape " +
           c10d::toString(tensor.sizes()) + "), expected " + std::to_string(expected));
  }
}

// The parts of a contiguous tensor, by their sizes in bytes.
inline std::vector<void*> cut(void* data, const std::vector<int64_t>& bytes) {
  std::vector<void*> parts;
  auto* at = static_cast<std::byte*>(data);
  for (int64_t n : bytes) {
    parts.push_back(at);
    at += n;
  }
  return parts;
}

// A row of tensors as the core takes them.
struct FlatList {
  explicit FlatList(const std::vector<at::Tensor>& tensors, bool read) {
    flats.reserve(tensors.size());
    for (const auto& tensor : tensors) {
      flats.emplace_back(tensor, read);
      data.push_back(flats.back().data());
      bytes.push_back(bytes_of(tensor));
    }
  }
  FlatList(const std::vector<at::Tensor>& tensors, const c10d::ReduceOp& op) {
    flats.reserve(tensors.size());
    for (const auto& tensor : tensors) {
      flats.emplace_back(tensor, op);
      data.push_back(flats.back().data());
    }
  }
  void write_back() {
    for (auto& flat : flats) flat.write_back();
  }
  const void* const* inputs() const { return data.data(); }
  std::vector<Flat> flats;
  std::vector<void*> data;
  std::vector<int64_t> bytes;
};

}  // namespace pypar
