// The only file that knows torch: checks, allocation, threading, and the operators' CPU kernels.
// The operators themselves (schemas, fake kernels, derivatives) are defined in fastgpt/ops.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
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

void prepare_weight(std::optional<Tensor>& weight, int64_t classes, DType dtype) {
  if (!weight.has_value()) return;
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == classes &&
                      weight->scalar_type() == accumulator_of(dtype),
                  "expected weight of shape (C,) in the accumulator type");
  *weight = torch::stable::contiguous(*weight);
}

// With what rounding takes from each partial sum (Neumaier, 1974): a smoothed loss is only as exact
// as this, and one after another the sums of a vocabulary lose a few bits of a double.
template <class A>
double sum_of(const Tensor& weight) {
  const A* data = static_cast<const A*>(weight.const_data_ptr());
  double sum = 0, lost = 0;
  for (int64_t i = 0; i < weight.size(0); ++i) {
    const double x = double(data[i]), next = sum + x;
    lost += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  return std::isfinite(sum) ? sum + lost : sum;
}

// The sum of the classes' weights, which only smoothing needs.
double total_weight(const std::optional<Tensor>& weight, int64_t classes, double smoothing) {
  if (smoothing == 0) return 0;
  if (!weight.has_value()) return double(classes);
  return weight->scalar_type() == ScalarType::Double ? sum_of<double>(*weight)
                                                     : sum_of<float>(*weight);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(Tensor logits, Tensor target,
                                                             std::optional<Tensor> weight,
                                                             int64_t ignore_index,
                                                             double label_smoothing) {
  check_rows(logits, target);
  logits = with_unit_stride(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_targets(target, classes, ignore_index);
  const DType dtype = dtype_of(logits);
  prepare_weight(weight, classes, dtype);
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
                                      weight.has_value() ? weight->const_data_ptr() : nullptr,
                                      total_weight(weight, classes, label_smoothing),
                                      label_smoothing,
                                      loss.mutable_data_ptr(),
                                      row_max.mutable_data_ptr(),
                                      rest.mutable_data_ptr()};
  const auto kernel = active_kernels().cross_entropy_forward[dtype];
  torch::stable::parallel_for(0, rows, grain(classes),
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return {loss, row_max, rest};
}

Tensor cross_entropy_backward_cpu(Tensor grad_loss, Tensor logits, Tensor target,
                                  std::optional<Tensor> weight, Tensor row_max, Tensor rest,
                                  int64_t ignore_index, double label_smoothing) {
  check_rows(logits, target);
  logits = with_unit_stride(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  // Again: whoever calls the operator itself may not have run the forward on this target.
  check_targets(target, classes, ignore_index);
  const DType dtype = dtype_of(logits);
  prepare_weight(weight, classes, dtype);
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
      weight.has_value() ? weight->const_data_ptr() : nullptr,
      total_weight(weight, classes, label_smoothing),
      label_smoothing,
      row_max.const_data_ptr(),
      rest.const_data_ptr(),
      grad_logits.mutable_data_ptr(),
      row_bytes >= kStreamRowBytes && rows * row_bytes >= kStreamBytes};
  const auto kernel = active_kernels().cross_entropy_backward[dtype];
  torch::stable::parallel_for(0, rows, grain(classes),
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return grad_logits;
}

// ---- attention ----

// The kernels read rows of unit stride. vmap, transposes and expanded upstream gradients bring
// others.
Tensor with_unit_columns(const Tensor& x) {
  return x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

Heads<const void> heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Heads<void> heads_of_result(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// (B, H, N, columns), in memory as (B, N, H, columns): what a model makes of it next is a view. Not
// the transpose of a new tensor, which autograd would take for a view of somebody's.
Tensor new_heads(const Tensor& heads, int64_t columns) {
  const int64_t B = heads.size(0), H = heads.size(1), N = heads.size(2);
  const std::vector<int64_t> sizes{B, H, N, columns};
  const std::vector<int64_t> strides{N * H * columns, columns, H * columns, 1};
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(heads),        from(sizes),        from(strides),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(),
                                        TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "attention: no memory for a result of shape (", B, ", ", H, ", ", N, ", ",
                  columns, ")");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

AttentionMask mask_of(const std::optional<Tensor>& mask, const Tensor& query, int64_t keys) {
  if (!mask.has_value()) return {kNoMask, nullptr, 0, 0, 0, 0};
  STD_TORCH_CHECK(mask->dim() == 4, "expected attn_mask (B, H, L, S)");
  const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), keys};
  int64_t strides[4];
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask->size(i) == sizes[i] || mask->size(i) == 1,
                    "expected attn_mask broadcastable to (B, H, L, S)");
    strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  const ScalarType type = mask->scalar_type();
  const MaskKind kind = type == ScalarType::Bool                  ? kBoolMask
                        : type == query.scalar_type()             ? kStorageMask
                        : type == accumulator_of(dtype_of(query)) ? kAccumulatorMask
                                                                  : kNoMask;
  STD_TORCH_CHECK(kind != kNoMask, "expected attn_mask of bool, query's or the accumulator type");
  return {kind, mask->const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& mask, bool is_causal, double scale) {
  STD_TORCH_CHECK(key.size(0) == query.size(0) && value.size(0) == query.size(0) &&
                      key.size(1) == value.size(1) && key.size(1) > 0 &&
                      query.size(1) % key.size(1) == 0 && key.size(2) == value.size(2) &&
                      key.size(3) == query.size(3),
                  "expected query (B, Hq, L, D), key (B, H, S, D) and value (B, H, S, Dv), Hq a "
                  "multiple of H");
  STD_TORCH_CHECK(
      key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
      "expected query, key and value of one type");
  STD_TORCH_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0,
                  "expected query, key and value that are not empty");
  return {query.size(0),   query.size(1),
          key.size(1),     query.size(2),
          key.size(2),     query.size(3),
          value.size(3),   is_causal,
          scale,           mask_of(mask, query, key.size(2)),
          heads_of(query), heads_of(key),
          heads_of(value)};
}

// One phase after another, the tasks of a phase by whichever thread is free: under a causal mask
// they differ in length.
template <class Arguments>
void run_attention(const AttentionKernel<Arguments>& kernel, const Arguments& a,
                   const Tensor& like) {
  const AttentionPlan plan = kernel.plan(a);
  // Waking a thread costs as much as so many multiply-adds.
  constexpr double kWorthAThread = 1 << 20;
  const double work = double(a.batch * a.query_heads) * double(a.queries) * double(a.keys) *
                      double(a.head_dim + a.value_dim);
  const int64_t threads =
      int64_t(std::min<double>(torch::stable::get_num_threads(), 1 + work / kWorthAThread));

  constexpr int64_t kLine = 64;
  const auto lines = [](int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; };
  const int64_t workspace = lines(plan.workspace_bytes), scratch = lines(plan.scratch_bytes);
  Tensor memory =
      torch::stable::new_empty(like, {workspace + threads * scratch + kLine}, ScalarType::Byte);
  advise_huge_pages(memory);
  const int64_t base = lines(reinterpret_cast<intptr_t>(memory.mutable_data_ptr()));
  const auto at = [&](int64_t offset) { return reinterpret_cast<void*>(base + offset); };
  for (int phase = 0; phase < 3; ++phase) {
    std::atomic<int64_t> next_task{0}, next_scratch{0};
    torch::stable::parallel_for(0, std::min(threads, plan.tasks[phase]), 1, [&](int64_t, int64_t) {
      void* own = at(workspace + scratch * next_scratch++);
      for (int64_t task; (task = next_task++) < plan.tasks[phase];) {
        kernel.run(a, phase, task, at(0), own);
      }
    });
  }
}

// Rows of unit stride, for the kernels, of tensors of four dimensions.
void prepare(std::initializer_list<Tensor*> tensors) {
  for (Tensor* x : tensors) {
    STD_TORCH_CHECK(x->dim() == 4, "expected tensors of four dimensions, (B, heads, N, columns)");
    *x = with_unit_columns(*x);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward_cpu(Tensor query, Tensor key,
                                                                 Tensor value,
                                                                 std::optional<Tensor> mask,
                                                                 bool is_causal, double scale) {
  prepare({&query, &key, &value});
  const DType dtype = dtype_of(query);
  AttentionForward arguments;
  static_cast<Attention&>(arguments) = attention_of(query, key, value, mask, is_causal, scale);
  Tensor output = new_heads(query, value.size(3));
  Tensor rounding =
      new_heads(query, accumulator_of(dtype) == query.scalar_type() ? 0 : value.size(3));
  const auto per_row = [&] {
    return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)},
                                    accumulator_of(dtype));
  };
  Tensor row_max = per_row(), row_sum = per_row();
  arguments.threads = torch::stable::get_num_threads();
  arguments.output = heads_of_result(output);
  arguments.rounding = heads_of_result(rounding);
  arguments.row_max = row_max.mutable_data_ptr();
  arguments.row_sum = row_sum.mutable_data_ptr();
  run_attention(active_kernels().attention_forward[dtype], arguments, query);
  return {output, rounding, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
    Tensor output, Tensor rounding, Tensor row_max, Tensor row_sum, bool is_causal, double scale) {
  prepare({&query, &key, &value, &grad_output, &output, &rounding});
  const DType dtype = dtype_of(query);
  AttentionBackward arguments;
  static_cast<Attention&>(arguments) = attention_of(query, key, value, mask, is_causal, scale);
  const bool rounded = accumulator_of(dtype) != query.scalar_type();
  const Tensor* outputs[] = {&grad_output, &output, &rounding};
  for (const Tensor* x : outputs) {
    const int64_t columns = x != &rounding || rounded ? value.size(3) : 0;
    STD_TORCH_CHECK(x->size(0) == query.size(0) && x->size(1) == query.size(1) &&
                        x->size(2) == query.size(2) && x->size(3) == columns &&
                        x->scalar_type() == query.scalar_type(),
                    "expected grad_output, output and, of 16-bit types, rounding (B, Hq, L, Dv) of "
                    "query's type");
  }
  for (Tensor* x : {&row_max, &row_sum}) {
    STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == query.size(0) && x->size(1) == query.size(1) &&
                        x->size(2) == query.size(2) && x->scalar_type() == accumulator_of(dtype),
                    "expected row_max and row_sum (B, Hq, L) in the accumulator type");
    *x = torch::stable::contiguous(*x);
  }
  Tensor grad_query = new_heads(query, query.size(3));
  Tensor grad_key = new_heads(key, key.size(3));
  Tensor grad_value = new_heads(value, value.size(3));
  arguments.grad_output = heads_of(grad_output);
  arguments.output = heads_of(output);
  arguments.rounding = heads_of(rounding);
  arguments.row_max = row_max.const_data_ptr();
  arguments.row_sum = row_sum.const_data_ptr();
  arguments.grad_query = heads_of_result(grad_query);
  arguments.grad_key = heads_of_result(grad_key);
  arguments.grad_value = heads_of_result(grad_value);
  run_attention(active_kernels().attention_backward[dtype], arguments, query);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastgpt::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&fastgpt::attention_backward_cpu));
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
