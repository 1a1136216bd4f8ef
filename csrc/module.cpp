// The Python module arcore._C: host-side planners and build information. Tensors come as addresses with sizes
// and leave as bytearrays of int32, which Python wraps without a copy.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "common/tile_plan.h"

namespace py = pybind11;

namespace {

py::bytearray to_bytes(const std::vector<int32_t>& values) {
  return py::bytearray(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int32_t));
}

py::dict tile_plan(uintptr_t bounds, int64_t bounds_batch, int64_t heads, int64_t nq, int intervals,
                   uintptr_t key_bounds, int64_t key_bounds_batch, int64_t nk, int64_t tile_q,
                   int64_t tile_k) {
  const arcore::IntervalMaskView mask{.bounds = reinterpret_cast<const int32_t*>(bounds),
                                      .key_bounds = reinterpret_cast<const int32_t*>(key_bounds),
                                      .bounds_batch = bounds_batch,
                                      .key_bounds_batch = key_bounds_batch,
                                      .heads = heads,
                                      .nq = nq,
                                      .nk = nk,
                                      .intervals = intervals};
  const arcore::TilePlan plan = arcore::plan_tiles(mask, tile_q, tile_k);
  py::dict out;
  out["row_ptr"] = to_bytes(plan.by_query.ptr);
  out["col_idx"] = to_bytes(plan.by_query.idx);
  out["full"] = to_bytes(plan.by_query.full);
  out["order"] = to_bytes(plan.by_query.order);
  out["col_ptr"] = to_bytes(plan.by_key.ptr);
  out["row_idx"] = to_bytes(plan.by_key.idx);
  out["col_full"] = to_bytes(plan.by_key.full);
  out["col_order"] = to_bytes(plan.by_key.order);
  return out;
}

py::dict build_info() {
  py::dict out;
  out["torch"] = ARCORE_BUILD_TORCH;
  out["cuda_archs"] = ARCORE_BUILD_CUDA_ARCHS;
  out["compiler"] = ARCORE_BUILD_COMPILER;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "arcore's host-side planners and build information";
  module.def("tile_plan", &tile_plan, py::kw_only(), py::arg("bounds"), py::arg("bounds_batch"),
             py::arg("heads"), py::arg("nq"), py::arg("intervals"), py::arg("key_bounds"),
             py::arg("key_bounds_batch"), py::arg("nk"), py::arg("tile_q"), py::arg("tile_k"),
             "CSR of the tiles of an interval mask that hold an allowed pair; see csrc/common/tile_plan.h.");
  module.def("build_info", &build_info, "What this build was made with.");
}
