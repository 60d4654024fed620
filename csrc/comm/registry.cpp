#include "comm/registry.h"

#include <map>
#include <optional>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace pypar {

namespace {

struct Entry {
  std::weak_ptr<Communicator> communicator;
  std::weak_ptr<Hosts> hosts;
  // Of a group of another backend only. The weak pointer tells a later group of the same name from this one.
  std::shared_ptr<Communicator> owned;
  std::optional<c10::weak_intrusive_ptr<c10d::ProcessGroup>> group;
};

std::mutex& mutex() {
  static std::mutex m;
  return m;
}

std::map<std::string, Entry>& entries() {
  static auto* map = new std::map<std::string, Entry>;  // outlives every group, whatever the order of exit
  return *map;
}

// In slices, so that Ctrl-C is noticed; the store's own wait can't be interrupted.
void wait_for_key(c10d::Store& store, const std::string& key) {
  constexpr std::chrono::milliseconds slice(100);
  const auto timeout = store.getTimeout();
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    const auto slice_begin = std::chrono::steady_clock::now();
    try {
      return store.wait({key}, slice);
    } catch (const std::exception&) {  // each kind of store has its own
      const auto now = std::chrono::steady_clock::now();
      const bool failed = now - slice_begin < slice;  // not for want of time: the store is gone
      if (failed || (timeout != c10d::Store::kNoTimeout && now - begin >= timeout)) throw;
    }
    check_interrupt([&] { return "this rank was interrupted while it waited for '" + key + "' in the store"; });
  }
}

}  // namespace

KeyValue key_value_of(const c10::intrusive_ptr<c10d::Store>& store) {
  return {[store](const std::string& key, const std::string& value) {
            store->set(key, std::vector<uint8_t>(value.begin(), value.end()));
          },
          [store](const std::string& key) {
            wait_for_key(*store, key);
            const auto value = store->get(key);
            return std::string(value.begin(), value.end());
          }};
}

void register_communicator(const std::string& group_name, const std::shared_ptr<Communicator>& communicator,
                           const std::shared_ptr<Hosts>& hosts) {
  std::lock_guard<std::mutex> lock(mutex());
  entries().insert_or_assign(group_name, Entry{communicator, hosts, nullptr, std::nullopt});
}

std::shared_ptr<Hosts> find_hosts(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(mutex());
  const auto found = entries().find(group_name);
  return found == entries().end() ? nullptr : found->second.hosts.lock();
}

std::shared_ptr<Communicator> find_communicator(const std::string& group_name) {
  std::unique_lock<std::mutex> lock(mutex());
  auto& map = entries();
  if (auto found = map.find(group_name); found != map.end()) {
    const Entry& entry = found->second;
    const bool stale = entry.group.has_value() && entry.group->expired();
    if (auto communicator = entry.communicator.lock(); communicator != nullptr && !stale) {
      if (!communicator->whole_group()) return nullptr;
      lock.unlock();
      communicator->flush();
      return communicator;
    }
    map.erase(found);
  }
  const auto group = c10d::resolve_process_group(group_name);
  const auto store = c10::make_intrusive<c10d::PrefixStore>("pypar", group->getStore());
  const auto timeout = store->getTimeout();
  auto communicator = std::make_shared<Communicator>(Mesh::connect(group_name, group->getRank(), group->getSize(),
                                                                   key_value_of(store), Communicator::segment_bytes,
                                                                   static_cast<uint64_t>(timeout.count())));
  communicator->set_timeout(timeout);
  map.insert_or_assign(group_name,
                       Entry{communicator, {}, communicator, c10::weak_intrusive_ptr<c10d::ProcessGroup>(group)});
  return communicator->whole_group() ? communicator : nullptr;
}

std::shared_ptr<Communicator> communicator_of(const std::string& group_name) {
  auto communicator = find_communicator(group_name);
  if (communicator == nullptr) {
    throw PeerError("group '" + group_name +
                    "' spans several hosts: its ranks share no memory; use a group whose ranks are on one host "
                    "(torch.distributed.new_group), or the collectives of torch.distributed");
  }
  return communicator;
}

}  // namespace pypar
