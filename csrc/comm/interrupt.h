// How a wait in C++ learns that its own rank shall stop, as by Ctrl-C. The core knows no Python: a hook looks.
#pragma once

#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

namespace pypar {

// This rank was told to stop while it waited; no peer is at fault. Python sees `cause`.
struct Interrupted : std::runtime_error {
  Interrupted(const std::string& what, std::exception_ptr cause) : std::runtime_error(what), cause(std::move(cause)) {}
  std::exception_ptr cause;
};

// Returns why the calling thread shall stop, or null. It may run anything: no lock that others need may be held for it.
using InterruptCheck = std::exception_ptr (*)();

inline std::atomic<InterruptCheck> interrupt_check{nullptr};

inline void set_interrupt_check(InterruptCheck check) {
  interrupt_check.store(check);
}

// Throws Interrupted if the calling thread shall stop. Call it between slices of any wait.
template <typename Text>
void check_interrupt(Text&& text) {
  const InterruptCheck check = interrupt_check.load(std::memory_order_relaxed);
  if (check == nullptr) return;
  if (std::exception_ptr cause = check()) throw Interrupted(text(), std::move(cause));
}

}  // namespace pypar
