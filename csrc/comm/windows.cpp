#include "comm/windows.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "comm/types.h"

namespace pypar {

namespace {

constexpr int kOffsetBits = 40;

uint32_t id_of(uint64_t place) {
  return static_cast<uint32_t>(place >> kOffsetBits);
}

}  // namespace

Windows::Entry& Windows::entry(int rank, uint64_t place) const {
  return tables_[static_cast<size_t>(rank)][id_of(place) % kEntries];
}

void Windows::add(const std::byte* base, const std::shared_ptr<Window>& window) {
  std::lock_guard<std::mutex> lock(mutex_);
  window->id = next_id_++;
  by_base_[base] = window;
  by_id_[window->id] = window;
  auto& known = tables_[static_cast<size_t>(rank_)][window->id % kEntries].id;
  std::atomic_ref<uint32_t>(known).store(window->id, std::memory_order_seq_cst);
  sweep();
}

void Windows::forget(const std::byte* base) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto node = by_base_.extract(base);
  if (node.empty()) return;
  uint32_t id = node.mapped()->id;
  auto& known = tables_[static_cast<size_t>(rank_)][id % kEntries].id;
  std::atomic_ref<uint32_t>(known).compare_exchange_strong(id, 0, std::memory_order_seq_cst);
  sweep();
}

// Unmaps what is freed and not pinned.
void Windows::sweep() {
  std::erase_if(by_id_, [&](const auto& item) {
    const auto& [id, window] = item;
    const bool held = std::any_of(by_base_.begin(), by_base_.end(), [&](const auto& b) { return b.second == window; });
    auto& pins = tables_[static_cast<size_t>(rank_)][id % kEntries].pins;
    return !held && std::atomic_ref<uint32_t>(pins).load(std::memory_order_seq_cst) == 0;
  });
}

uint64_t Windows::find(const void* data, size_t bytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto* begin = static_cast<const std::byte*>(data);
  auto after = by_base_.upper_bound(begin);
  if (after == by_base_.begin()) return 0;
  const auto& [base, window] = *std::prev(after);
  const auto offset = static_cast<size_t>(begin - base);
  if (offset + bytes > window->bytes) return 0;
  return static_cast<uint64_t>(window->id) << kOffsetBits | offset;
}

std::byte* Windows::at(uint64_t place, int rank) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_id_.find(id_of(place));
  if (found == by_id_.end()) throw PeerError("internal: window " + std::to_string(id_of(place)) + " is unknown");
  return found->second->bases[static_cast<size_t>(rank)] + (place & ((1ull << kOffsetBits) - 1));
}

bool Windows::pin(uint64_t place, int rank) {
  Entry& theirs = entry(rank, place);
  std::atomic_ref<uint32_t>(theirs.pins).fetch_add(1, std::memory_order_seq_cst);
  if (std::atomic_ref<uint32_t>(theirs.id).load(std::memory_order_seq_cst) == id_of(place)) return true;
  std::atomic_ref<uint32_t>(theirs.pins).fetch_sub(1, std::memory_order_seq_cst);
  return false;
}

void Windows::unpin(uint64_t place) {
  std::atomic_ref<uint32_t>(entry(rank_, place).pins).fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace pypar
