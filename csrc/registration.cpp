// The only file that knows torch: checks, allocation, threading, and the operators' CPU kernels.
// The operators themselves (schemas, fake kernels, derivatives) are defined in fastgpt/ops.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16 logits");
  }
  return kFloat32;
}

ScalarType accumulator_of(DType dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Rows that one thread should at least have: less work than this costs less than waking a thread.
int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
}

// A fresh allocation of this size comes as untouched pages, and faulting them in 4 KiB at a time
// costs more than the arithmetic that fills them.
void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + size_t(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  // Only advice: where it is refused the pages are small and the result is the same.
  if (end > first + kHugePage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

// Above this size a gradient is written around the caches, which it would only flush.
constexpr int64_t kStreamBytes = int64_t(8) << 20;
constexpr int64_t kStreamRowBytes = 4096;

void check_rows(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0),
                  "expected logits (N, C) and target (N,)");
  STD_TORCH_CHECK(logits.size(1) > 0, "expected at least one class");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "expected int64 target");
}

// The kernels read a row with unit stride. The public function sends other logits elsewhere, but
// vmap and torch's zero tensors still bring some.
Tensor with_unit_stride(const Tensor& logits) {
  const bool readable = logits.stride(1) == 1 || logits.size(1) == 1;
  return readable ? logits : torch::stable::contiguous(logits);
}

// Before the parallel loop, where an exception would lose its text.
void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t* data = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t count = target.size(0), stride = target.stride(0);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t t = data[row * stride];
    STD_TORCH_CHECK((t >= 0 && t < classes) || t == ignore_index, "Target ", t,
                    " is out of bounds. Row ", row, " of ", count, ": expected 0 <= target < ",
                    classes, " (the number of classes) or ignore_index (", ignore_index, ").");
  }
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(Tensor logits, Tensor target,
                                                             int64_t ignore_index) {
  check_rows(logits, target);
  logits = with_unit_stride(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_targets(target, classes, ignore_index);
  const DType dtype = dtype_of(logits);
  const auto per_row = [&] {
    return torch::stable::new_empty(logits, {rows}, accumulator_of(dtype));
  };
  Tensor loss = per_row(), row_max = per_row(), rest = per_row();

  const CrossEntropyForward arguments{logits.const_data_ptr(),
                                      logits.stride(0),
                                      static_cast<const int64_t*>(target.const_data_ptr()),
                                      target.stride(0),
                                      classes,
                                      ignore_index,
                                      loss.mutable_data_ptr(),
                                      row_max.mutable_data_ptr(),
                                      rest.mutable_data_ptr()};
  const auto kernel = active_kernels().cross_entropy_forward[dtype];
  torch::stable::parallel_for(0, rows, grain(classes),
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return {loss, row_max, rest};
}

Tensor cross_entropy_backward_cpu(Tensor grad_loss, Tensor logits, Tensor target, Tensor row_max,
                                  Tensor rest, int64_t ignore_index) {
  check_rows(logits, target);
  logits = with_unit_stride(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  // Again: whoever calls the operator itself may not have run the forward on this target.
  check_targets(target, classes, ignore_index);
  const DType dtype = dtype_of(logits);
  const Tensor* vectors[] = {&grad_loss, &row_max, &rest};
  for (const Tensor* v : vectors) {
    STD_TORCH_CHECK(
        v->dim() == 1 && v->size(0) == rows && v->scalar_type() == accumulator_of(dtype),
        "expected grad_loss, row_max and rest of shape (N,) in the accumulator type");
  }
  STD_TORCH_CHECK(row_max.is_contiguous() && rest.is_contiguous(),
                  "expected contiguous row_max and rest");
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, classes});
  const int64_t row_bytes = classes * int64_t(logits.element_size());
  advise_huge_pages(grad_logits);

  const CrossEntropyBackward arguments{
      grad_loss.const_data_ptr(),
      grad_loss.stride(0),
      logits.const_data_ptr(),
      logits.stride(0),
      static_cast<const int64_t*>(target.const_data_ptr()),
      target.stride(0),
      classes,
      ignore_index,
      row_max.const_data_ptr(),
      rest.const_data_ptr(),
      grad_logits.mutable_data_ptr(),
      row_bytes >= kStreamRowBytes && rows * row_bytes >= kStreamBytes};
  const auto kernel = active_kernels().cross_entropy_backward[dtype];
  torch::stable::parallel_for(0, rows, grain(classes),
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return grad_logits;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fastgpt::cross_entropy_forward_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastgpt::cross_entropy_backward_cpu));
}

// ---- the Python module: which instruction sets there are, and which one runs
// ----------------------

namespace {

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyTuple_New(fastgpt::isa_count());
  for (int i = 0; names != nullptr && i < fastgpt::isa_count(); ++i) {
    PyTuple_SetItem(names, i, PyUnicode_FromString(fastgpt::isa_at(i).isa));
  }
  return names;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastgpt::active_kernels().isa); }

PyObject* set_isa(PyObject*, PyObject* name) {
  PyObject* utf8 = PyUnicode_AsUTF8String(name);
  if (utf8 == nullptr) return nullptr;
  const char* text = PyBytes_AsString(utf8);
  const bool found = text != nullptr && fastgpt::set_active_isa(text);
  Py_DECREF(utf8);
  if (!found) {
    return PyErr_Format(PyExc_ValueError, "this processor cannot run the instruction set %R", name);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "The instruction sets this processor can run, slowest first."},
    {"isa", isa, METH_NOARGS, "The instruction set that runs."},
    {"set_isa", set_isa, METH_O, "Choose the instruction set by name, for the whole process."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "The CPU kernels of fastgpt.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
