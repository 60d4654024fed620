#include "comm/watch.h"

#include <algorithm>
#include <sstream>

#include "pypar/signal.h"

namespace pypar {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kTick(500);
constexpr milliseconds kUrgent(30);
// Polls, not time, so that a job that was stopped and goes on finds its peers alive.
constexpr int kSilentPolls = 6;
constexpr int kLostPolls = 2;
// What a rank sent before it left has arrived by then.
constexpr uint64_t kGoneNs = 1'000'000'000;
constexpr milliseconds kVerdict(1500);
constexpr milliseconds kLastWords(2000);

}  // namespace

Watch::Watch(std::shared_ptr<Communicator> local, const std::vector<std::vector<int>>& hosts, int host,
             const c10::intrusive_ptr<c10d::Store>& store)
    : local_(std::move(local)),
      store_(store->clone()),  // a connection of its own: another thread's wait in the store would block this one's
      sends_(static_cast<size_t>(local_->num_places())) {
  for (size_t h = 0; h < hosts.size(); ++h) {
    std::string key = "pypar/host/" + std::to_string(h);
    if (static_cast<int>(h) == host) {
      own_key_ = std::move(key);
    } else {
      other_keys_.push_back(key);
      others_.push_back({std::move(key), hosts[h], "", 0});
    }
  }
  if (local_->rank() == 0) publish();
  store_->wait(other_keys_);
}

void Watch::start(Links links) {
  links_ = std::move(links);
  thread_ = std::thread([self = shared_from_this()] { self->run(); });
}

void Watch::wake() {
  std::lock_guard<std::mutex> lock(mutex_);
  woken_ = true;
  changed_.notify_all();
}

void Watch::stop() {
  std::unique_lock<std::mutex> lock(mutex_);
  stop_ = true;
  changed_.notify_all();
  if (!thread_.joinable()) return;
  changed_.wait_for(lock, kLastWords, [&] { return over_; });
  lock.unlock();
  if (over_) {
    thread_.join();
  } else {
    thread_.detach();  // it holds what it uses
  }
}

void Watch::run() {
  Communicator::set_background_thread(true);
  std::unique_lock<std::mutex> lock(mutex_);
  auto next_tick = std::chrono::steady_clock::now() + kTick;
  for (bool more = true; more && !stop_;) {
    const auto until = urgent_ > 0 ? std::min(next_tick, std::chrono::steady_clock::now() + kUrgent) : next_tick;
    changed_.wait_until(lock, until, [&] { return stop_ || woken_; });
    woken_ = false;
    if (stop_) break;
    const auto now = std::chrono::steady_clock::now();
    const bool tick = now >= next_tick;
    if (tick) next_tick = now + kTick;
    lock.unlock();
    more = poll(tick);
    lock.lock();
  }
  lock.unlock();
  try {
    publish();
  } catch (const std::exception&) {  // the store is gone, too: the connections tell that something happened
  }
  if (local_->aborted()) links_.cut();
  lock.lock();
  over_ = true;
  changed_.notify_all();
}

// False: the group is over.
bool Watch::poll(bool tick) {
  const int me = local_->rank();
  bool lowest = true;
  for (int r = 0; r < local_->world(); ++r) {
    if (r == me || local_->has_left(r)) continue;
    lowest = lowest && r > me;
    const bool dead = !local_->mesh().alive(r);
    if (!dead || local_->has_left(r)) continue;  // asked again: it may have left and ended in between
    local_->abort(whom({r}) + " (process " + std::to_string(local_->mesh().pids[static_cast<size_t>(r)]) +
                  ") is dead; its own output says why");
  }
  if (!local_->aborted()) look_around(lowest, tick);
  return !local_->aborted();
}

void Watch::look_around(bool lowest, bool tick) {
  num_ticks_ += tick;
  try {
    if (lowest && tick) publish();
    // The others need the news only while they wait for another host, or now and then.
    const bool waits = awaited_call_ != 0 || !tick;
    if (!lowest && !waits && num_ticks_ % 4 != 0) return;
    const auto lines = store_->multiGet(other_keys_);
    for (size_t h = 0; h < others_.size() && !local_->aborted(); ++h) {
      hear(others_[h], std::string(lines[h].begin(), lines[h].end()), lowest && tick);
    }
    lost_polls_ = 0;
  } catch (const std::exception&) {
    if (tick) store_is_lost();
  }
}

void Watch::hear(Host& host, const std::string& line, bool count) {
  std::istringstream in(line);
  std::string beat, who_left, word;
  std::getline(in, beat);
  std::getline(in, who_left);
  const std::string reason((std::istreambuf_iterator<char>(in)), {});
  if (!reason.empty()) return local_->abort(reason);
  std::istringstream words(who_left);
  size_t num_left = 0;
  int rank;
  uint64_t calls;
  for (char colon; words >> rank >> colon >> calls; ++num_left) {
    const int place = place_of(rank);
    bool gone;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      gone = now_ns() - left_since_ns_.try_emplace(place, now_ns()).first->second >= kGoneNs;
    }
    if (gone) local_->set_gone(place);
    if (awaited_call_ > calls || (gone && sends_[static_cast<size_t>(place)] > 0)) {
      return local_->abort("group '" + local_->name() + "': " + local_->rank_text(place) + kHasLeft);
    }
  }
  if (!count || num_left == host.ranks.size()) return;
  host.silent_polls = beat == host.beat ? host.silent_polls + 1 : 0;
  host.beat = beat;
  if (host.silent_polls < kSilentPolls) return;
  std::vector<int> places;
  for (int r : host.ranks) places.push_back(place_of(r));
  local_->abort(whom(places) + " gave no sign of life for " + std::to_string(kSilentPolls * kTick.count()) +
                " ms; did the host or its network go down, or was the process stopped?");
}

// Whoever kept the store may have left in good order. If nobody's connections closed, the group can go on without.
void Watch::store_is_lost() {
  if (++lost_polls_ < kLostPolls || lost_polls_ > 2 * kLostPolls) return;
  const auto places = dead_places();
  if (places.empty()) return;
  local_->abort(whom(places) +
                " closed the connection, and the store of the group went with it; did the process that keeps it die? "
                "Its own output says why");
}

// Of ranks that closed their connection without a farewell.
std::vector<int> Watch::dead_places() {
  std::vector<int> places = links_.closed();
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(places, [&](int place) { return left_since_ns_.contains(place); });
  return places;
}

void Watch::fail(const std::string& what, const std::string& error, Deadline deadline) {
  constexpr uint64_t kSlackNs = 50'000'000;
  const bool late = deadline.at_ns != 0 && now_ns() + kSlackNs >= deadline.at_ns;
  const std::string where = local_->rank_text(local_->rank()) + " of group '" + local_->name() + "' in " + what + ": ";
  if (late) {
    local_->abort(where + "waited " + std::to_string(deadline.timeout_ms) +
                  " ms for other hosts, the timeout of the group; a rank skipped the call, is stuck, or needs a longer "
                  "timeout");
  } else {
    // A connection that closed may be that of a rank that only heard of the fault before this one.
    std::unique_lock<std::mutex> lock(mutex_);
    ++urgent_;
    woken_ = true;
    changed_.notify_all();
    changed_.wait_for(lock, kVerdict, [&] { return over_ || local_->aborted(); });
    --urgent_;
  }
  if (!local_->aborted()) {
    const auto places = dead_places();
    local_->abort(where + (places.empty() ? "" : whom(places) + " closed the connection, did it die? ") + error);
  }
  wake();
  throw PeerError(local_->reason());
}

void Watch::publish() {
  std::string told;
  do {  // ranks that leave at once must not overwrite each other's news
    told = line();
    const std::string text = std::to_string(now_ns()) + '\n' + told;
    store_->set(own_key_, std::vector<uint8_t>(text.begin(), text.end()));
  } while (line() != told);
}

std::string Watch::line() const {
  std::string text;
  for (int r = 0; r < local_->world(); ++r) {
    if (!local_->has_left(r)) continue;
    text += std::to_string(local_->group_rank(r)) + ':' + std::to_string(local_->left_after(r)) + ' ';
  }
  return text + '\n' + local_->reason();
}

int Watch::place_of(int rank) const {
  int place = 0;
  while (place + 1 < local_->num_places() && local_->group_rank(place) != rank) ++place;
  return place;
}

// "rank 2, rank 3 of group 'g'"
std::string Watch::whom(const std::vector<int>& places) const {
  std::string text;
  for (int place : places) text += (text.empty() ? "" : ", ") + local_->rank_text(place);
  return text + " of group '" + local_->name() + "'";
}

}  // namespace pypar
