// Group name -> Communicator, so that operators that name a group find its shared memory.
#pragma once

#include <memory>
#include <string>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "comm/communicator.h"
#include "comm/hosts.h"

namespace pypar {

// The process group "pypar" registers its communicator, and its hosts if it spans several; the registry doesn't keep
// them alive.
void register_communicator(const std::string& group_name, const std::shared_ptr<Communicator>& communicator,
                           const std::shared_ptr<Hosts>& hosts);
// Null if the group is not one of the backend "pypar" that spans hosts.
std::shared_ptr<Hosts> find_hosts(const std::string& group_name);
// Null if some rank of the group is on another host. A group of another backend gets a communicator of its own, made
// (collectively, once) over the group's store, which the registry keeps.
std::shared_ptr<Communicator> find_communicator(const std::string& group_name);
// The same, but throws PeerError where find_communicator returns null.
std::shared_ptr<Communicator> communicator_of(const std::string& group_name);
// c10d's store as the bootstrap needs it.
KeyValue key_value_of(const c10::intrusive_ptr<c10d::Store>& store);

}  // namespace pypar
