#include "comm/messages.h"

#include <ATen/ATen.h>

#include "comm/errors.h"
#include "comm/tensors.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

// Tags in gloo; the users' are in the headers. monitoredBarrier counts from 0.
constexpr int kHeaderTag = 1 << 29;
constexpr int kPayloadTag = 1 << 30;
constexpr int kNumPayloadTags = 1 << 29;
constexpr std::chrono::hours kForever(24 * 365 * 10);

struct Header {
  int64_t tag;
  uint64_t bytes;
  int32_t payload_tag;
  DType dtype;
  std::byte payload[1000];  // if it fits
};

at::Tensor bytes_at(const void* data, size_t bytes) {
  return at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(bytes)}, at::kByte);
}

std::string text_of(const char* verb, DType dtype, size_t bytes, int64_t tag, const std::string& rank) {
  return std::string(verb) + "(" + name_of(dtype) + "[" + std::to_string(bytes / item_size(dtype)) + "], tag " +
         std::to_string(tag) + ") " + rank;
}

}  // namespace

Messages::Messages(Communicator& local, Rings& rings, c10::intrusive_ptr<c10d::Backend> gloo,
                   std::shared_ptr<Watch> watch)
    : local_(local), rings_(rings), gloo_(std::move(gloo)), watch_(std::move(watch)) {}

Messages::~Messages() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    if (listening_) listening_->abort();
  }
  if (thread_.joinable()) thread_.join();
}

c10::intrusive_ptr<c10d::Work> Messages::send(const at::Tensor& flat, int place, int64_t tag, uint64_t sequence,
                                              const std::vector<at::Tensor>& tensors) {
  const int rank = local_.group_rank(place);
  const std::string text = text_of("send", movable_dtype(flat), flat.nbytes(), tag, "to " + local_.rank_text(place));
  local_.check_alive(local_.rank(), text, {});
  at::Tensor header_bytes = at::empty({sizeof(Header)}, at::kByte);
  std::vector<WorkPtr> parts;
  try {
    std::lock_guard<std::mutex> lock(mutex_);  // headers travel in the order of the sends
    Header header{tag, flat.nbytes(), kPayloadTag + next_payload_, movable_dtype(flat), {}};
    const bool fits = header.bytes <= sizeof header.payload;
    if (fits) copy_bytes(header.payload, flat.data_ptr(), header.bytes);
    next_payload_ = (next_payload_ + 1) % kNumPayloadTags;
    std::memcpy(header_bytes.data_ptr(), &header, sizeof header);
    std::vector<at::Tensor> head{header_bytes}, payload{bytes_at(flat.data_ptr(), flat.nbytes())};
    if (!fits) parts.push_back(gloo_->send(payload, rank, header.payload_tag));
    parts.push_back(gloo_->send(head, rank, kHeaderTag));
  } catch (const std::exception& error) {
    const Watch::Send waiting(*watch_, place);
    watch_->fail(text, error.what(), {});
  }
  return c10::make_intrusive<RemoteSend>(std::move(parts), flat, place, text, local_.default_deadline(), watch_,
                                         local_.group_rank(local_.rank()), c10d::OpType::SEND, sequence,
                                         TensorLists{tensors}, "pypar:send", &tensors);
}

bool RemoteSend::wait(std::chrono::milliseconds timeout) {
  return with_python_errors([&] {
    std::lock_guard<std::mutex> one_at_a_time(waiting_);
    if (!done()) {
      const auto deadline = timeout == kNoTimeout ? deadline_ : Deadline::after(timeout);
      std::exception_ptr error;
      try {
        const Watch::Send waiting(*watch_, place_);
        try {
          for (const auto& part : parts_) part->wait(timeout);
        } catch (const std::exception& gloo_error) {
          watch_->fail(text_, gloo_error.what(), deadline);
        }
      } catch (...) {
        error = for_python(std::current_exception());
      }
      complete(error);
      parts_.clear();
      kept_.reset();
    }
    if (auto error = exception()) std::rethrow_exception(error);
    return true;
  });
}

void Messages::listen() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!thread_.joinable() && !stop_) thread_ = std::thread([this] { run(); });
}

void Messages::run() {
  Communicator::set_background_thread(true);
  std::vector<at::Tensor> head{at::empty({sizeof(Header)}, at::kByte)};
  try {
    for (;;) {
      WorkPtr work;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (stop_) return;
        work = listening_ = gloo_->recvAnysource(head, kHeaderTag);
      }
      if (!work->wait(kForever)) return;
      Header header;
      std::memcpy(&header, head[0].data_ptr(), sizeof header);
      const int rank = work->sourceRank();
      int place = local_.world();
      while (local_.group_rank(place) != rank) ++place;
      rings_.announce(place, header.tag, header.bytes, header.dtype, [this, header, rank](std::byte* to) {
        if (header.bytes <= sizeof header.payload) return copy_bytes(to, header.payload, header.bytes);
        fetch(to, rank, header.payload_tag, header.bytes);
      });
    }
  } catch (const std::exception& error) {
    try {
      watch_->fail("recv", error.what(), {});
    } catch (const PeerError&) {  // who waits hears it from the communicator
    }
  }
}

void Messages::fetch(std::byte* to, int rank, int tag, size_t bytes) {
  const Deadline deadline = local_.default_deadline();
  try {
    std::vector<at::Tensor> payload{bytes_at(to, bytes)};
    gloo_->recv(payload, rank, tag)->wait();
  } catch (const std::exception& error) {
    watch_->fail("recv of " + std::to_string(bytes) + " bytes from rank " + std::to_string(rank), error.what(),
                 deadline);
  }
}

}  // namespace pypar
