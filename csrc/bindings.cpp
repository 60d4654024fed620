// Python's view of comm/. Everything else is reached through torch.ops.pypar and torch.distributed.

#include <array>
#include <chrono>
#include <thread>

#include <pybind11/chrono.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "comm/contiguous.h"
#include "comm/errors.h"
#include "comm/process_group.h"
#include "comm/registry.h"
#include "cpu/decide.h"
#include "cpu/reduce.h"
#include "cpu/ring.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  return info;
}

pypar::InnerGroups make_inner(const py::object& factory, const pypar::InnerRequest& request) {
  py::gil_scoped_acquire gil;
  py::object whole, across;
  std::tie(whole, across) = factory(request.store, request.rank, request.size, request.across_index,
                                    request.across_rank, request.across_size, request.timeout)
                                .cast<std::pair<py::object, py::object>>();
  using Backend = c10::intrusive_ptr<c10d::Backend>;
  return {whole.cast<Backend>(), across.is_none() ? nullptr : across.cast<Backend>()};
}

// pypar.testing.stalls: a pure function of (seed, rank, round), so that a run stalls in the same places again.
unsigned stall_seed = 0;
uint32_t stall_most_us = 0;

void stall(int rank, uint32_t round) {
  uint32_t x = (stall_seed * 2654435761u) ^ (static_cast<uint32_t>(rank) * 40503u) ^ (round * 2246822519u);
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  if (x % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(x / 4 % stall_most_us));
}

void set_stalls(unsigned seed, uint32_t most_us) {
  stall_seed = seed;
  stall_most_us = most_us;
  pypar::Communicator::set_stall(most_us == 0 ? nullptr : stall);
}

py::dict decide(const std::string& overlap, int64_t rows, int64_t row_bytes, double flop, double flop_per_s,
                int num_hosts, double latency_s, double bytes_per_s, double chunk_s, double wire_cpu) {
  const auto kind = overlap == "gather"    ? pypar::Overlap::gather
                    : overlap == "scatter" ? pypar::Overlap::scatter
                                           : pypar::Overlap::reduce;
  const auto d =
      pypar::decide({kind, rows, row_bytes, flop, flop_per_s, num_hosts, latency_s, bytes_per_s, chunk_s, wire_cpu});
  py::dict result;
  result["num_chunks"] = d.num_chunks;
  result["matmul_s"] = d.matmul_s;
  result["wire_s"] = d.wire_s;
  result["whole_s"] = d.whole_s;
  result["chunked_s"] = d.chunked_s;
  return result;
}

std::shared_ptr<pypar::Hosts> hosts_of(const std::string& group_name) {
  auto hosts = pypar::find_hosts(group_name);
  if (hosts == nullptr) throw pypar::ArgumentError("group '" + group_name + "' is not one of pypar that spans hosts");
  return hosts;
}

// Of all ranks, unless it was made or set before.
pypar::Calibration calibration(const std::string& group_name) {
  return pypar::with_python_errors([&] {
    const auto hosts = hosts_of(group_name);
    pypar::Calibration result;
    hosts->run([&](pypar::Deadline deadline) { result = hosts->calibration(deadline); });
    return result;
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pypar::register_exception_translator();
  pypar::watch_signals();
  py::module_::import("torch.distributed");  // the base classes

  py::class_<pypar::ProcessGroup::Options, c10d::Backend::Options, c10::intrusive_ptr<pypar::ProcessGroup::Options>>(
      m, "Options")
      .def(py::init<std::chrono::milliseconds>(), py::arg("timeout"))
      .def("__deepcopy__", [](const pypar::ProcessGroup::Options& self, const py::dict&) {
        auto copy = c10::make_intrusive<pypar::ProcessGroup::Options>(self.timeout);
        copy->group_name = self.group_name;
        return copy;
      });

  py::class_<pypar::ProcessGroup, c10d::Backend, c10::intrusive_ptr<pypar::ProcessGroup>>(m, "ProcessGroup")
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, const std::string& name,
                       std::chrono::milliseconds timeout) {
             auto options = c10::make_intrusive<pypar::ProcessGroup::Options>(timeout);
             options->group_name = name;
             return c10::make_intrusive<pypar::ProcessGroup>(store, rank, size, options);
           }),
           py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("name"), py::arg("timeout"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "options",
          [](pypar::ProcessGroup& self) {
            return c10::static_intrusive_pointer_cast<pypar::ProcessGroup::Options>(self.getBackendOptions());
          })
      .def("_set_default_timeout", &pypar::ProcessGroup::setTimeout, py::arg("timeout"))
      .def_property_readonly("hosts", &pypar::ProcessGroup::hosts, "ranks of the group by host")
      .def_property_readonly("spans_hosts", &pypar::ProcessGroup::spans_hosts)
      .def(
          "end", [](const pypar::ProcessGroup& self, const std::string& why) { self.communicator()->abort(why); },
          py::arg("why"), "ends every wait of every rank of the group, which raise PeerError with `why`")
      .def_property_readonly(
          "calls", [](const pypar::ProcessGroup& self) { return self.communicator()->calls(); },
          "collectives that this rank has made in shared memory");

  // The ops ring_send and ring_recv without what they look up and check in every call.
  using pypar::RingEnd;
  py::class_<RingEnd>(m, "RingEnd")
      .def(py::init([](at::Tensor mine, at::Tensor theirs, int64_t num_slots, int64_t peer, const std::string& group) {
             return pypar::with_python_errors([&] {
               return std::make_unique<RingEnd>("RingEnd", std::move(mine), std::move(theirs), num_slots, peer, group);
             });
           }),
           py::arg("mine"), py::arg("theirs"), py::arg("num_slots"), py::arg("peer"), py::arg("group_name"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "send",
          [](const RingEnd& self, const std::vector<at::Tensor>& tensors, int64_t tag) {
            pypar::with_python_errors([&] { self.send(tensors, tag); });
          },
          py::arg("tensors"), py::arg("tag"), py::call_guard<py::gil_scoped_release>())
      .def(
          "recv", [](const RingEnd& self) { return pypar::with_python_errors([&] { return self.recv(); }); },
          py::call_guard<py::gil_scoped_release>());

  using pypar::Calibration;
  py::class_<Calibration>(m, "Calibration")
      .def(py::init(
          [](const std::array<double, 8>& v) { return Calibration{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]}; }))
      .def_readonly("latency_s", &Calibration::latency_s)
      .def_readonly("bytes_per_s", &Calibration::bytes_per_s)
      .def_readonly("chunk_s", &Calibration::chunk_s)
      .def_readonly("wire_cpu", &Calibration::wire_cpu)
      .def_readonly("float32_flops", &Calibration::float32_flops)
      .def_readonly("float64_flops", &Calibration::float64_flops)
      .def_readonly("bfloat16_flops", &Calibration::bfloat16_flops)
      .def_readonly("float16_flops", &Calibration::float16_flops);
  m.def("calibration", &calibration, py::call_guard<py::gil_scoped_release>());
  m.def("set_calibration", [](const std::string& group_name, const std::optional<Calibration>& given) {
    hosts_of(group_name)->set_calibration(given);
  });
  m.def("decide", &decide);
  m.def("set_inner_factory", [](py::object factory) {
    auto kept = std::make_shared<py::object>(std::move(factory));
    pypar::set_inner_factory([kept](const pypar::InnerRequest& request) { return make_inner(*kept, request); });
  });
  m.def("set_stalls", &set_stalls, py::arg("seed"), py::arg("most_us"), "for pypar.testing.stalls");
  m.def("contiguous_parts", &pypar::contiguous_parts, py::arg("group_name"), py::arg("owners"), py::arg("bytes"),
        py::call_guard<py::gil_scoped_release>());
  m.def("give_back_pages", &pypar::give_back_pages, py::call_guard<py::gil_scoped_release>());
  m.def("build_info", &build_info);
  m.def("cpu_capability", &pypar::cpu_capability);
  m.def("copy_method", &pypar::copy_method);
}
