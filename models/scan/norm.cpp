// Mamba-2's gate and norm on a CPU, forward and backward, in one pass over the rows each.
//
//   v = y silu(z)      out = weight v / rms(v), the mean square over each group of channels
//
// y, z and their like are float32 or bfloat16, everything else float32. No row is longer than the first-level cache.
//
// Shapes: T rows (tokens), D channels, S channels of a group; V lanes of a vector.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

constexpr float EPS = 1e-5f;
// Rows of a task, which has its own sum of the weight's gradient.
constexpr int64_t ROWS = 64;

// 1 / rms of v = y silu(z).
template <typename T>
float inverse_rms(const T* y, const T* z, int64_t S) {
  vec squares{};
  for (int64_t s = 0; s < S; s += V) {
    const int lanes = std::min<int64_t>(V, S - s);
    const vec gate = load(z + s, lanes), v = load(y + s, lanes) * gate * sigmoid(gate);
    squares += v * v;
  }
  return 1.f / std::sqrt(sum(squares) / S + EPS);
}

template <typename T>
at::Tensor forward(const at::Tensor& y, const at::Tensor& z, const at::Tensor& weight, int64_t groups) {
  const int64_t D = weight.size(0), rows = y.numel() / D, S = D / groups;
  at::Tensor out = at::empty(y.sizes(), y.options());
  const T *y_ptr = y.data_ptr<T>(), *z_ptr = z.data_ptr<T>();
  const float* weight_ptr = weight.data_ptr<float>();
  T* out_ptr = out.data_ptr<T>();
#pragma omp parallel for num_threads(at::get_num_threads())
  for (int64_t i = 0; i < rows * groups; ++i) {
    const T *y_i = y_ptr + i * S, *z_i = z_ptr + i * S;
    const float inverse = inverse_rms(y_i, z_i, S), *w = weight_ptr + i % groups * S;
    for (int64_t s = 0; s < S; s += V) {
      const int lanes = std::min<int64_t>(V, S - s);
      const vec gate = load(z_i + s, lanes);
      store(out_ptr + i * S + s, load(y_i + s, lanes) * gate * sigmoid(gate) * inverse * load(w + s, lanes), lanes);
    }
  }
  return out;
}

template <typename T>
std::vector<at::Tensor> backward(const at::Tensor& dout, const at::Tensor& y, const at::Tensor& z,
                                 const at::Tensor& weight, int64_t groups) {
  const int64_t D = weight.size(0), rows = y.numel() / D, S = D / groups, tasks = (rows + ROWS - 1) / ROWS;
  at::Tensor dy = at::empty(y.sizes(), y.options()), dz = at::empty(y.sizes(), y.options());
  at::Tensor sums = at::zeros({tasks, D}, weight.options());
  const T *g_ptr = dout.data_ptr<T>(), *y_ptr = y.data_ptr<T>(), *z_ptr = z.data_ptr<T>();
  const float* weight_ptr = weight.data_ptr<float>();
  T *dy_ptr = dy.data_ptr<T>(), *dz_ptr = dz.data_ptr<T>();
  float* sums_ptr = sums.data_ptr<float>();
#pragma omp parallel for num_threads(at::get_num_threads())
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = task * ROWS * groups; i < std::min((task + 1) * ROWS, rows) * groups; ++i) {
      const T *y_i = y_ptr + i * S, *z_i = z_ptr + i * S, *g_i = g_ptr + i * S;
      const float inverse = inverse_rms(y_i, z_i, S), *w = weight_ptr + i % groups * S;
      float* dw = sums_ptr + task * D + i % groups * S;
      vec along{};  // of the gradient, along v / rms(v): its scale does not change the result
      for (int64_t s = 0; s < S; s += V) {
        const int lanes = std::min<int64_t>(V, S - s);
        const vec gate = load(z_i + s, lanes), unit = load(y_i + s, lanes) * gate * sigmoid(gate) * inverse;
        const vec grad = load(g_i + s, lanes) * unit;
        store(dw + s, load(dw + s, lanes) + grad, lanes);
        along += grad * load(w + s, lanes);
      }
      const float mean = sum(along) / S;
      for (int64_t s = 0; s < S; s += V) {
        const int lanes = std::min<int64_t>(V, S - s);
        const vec gate = load(z_i + s, lanes), open = sigmoid(gate), input = load(y_i + s, lanes);
        const vec unit = input * gate * open * inverse;
        const vec dv = (load(g_i + s, lanes) * load(w + s, lanes) - unit * mean) * inverse;
        store(dy_ptr + i * S + s, dv * gate * open, lanes);
        store(dz_ptr + i * S + s, dv * input * open * (1.f + gate * (1.f - open)), lanes);
      }
    }
  }
  return {dy, dz, sums.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rayduce, m) {
  m.def("norm_forward", [](at::Tensor y, at::Tensor z, at::Tensor weight, int64_t groups) {
    return of_type(y, [&](auto zero) { return forward<decltype(zero)>(y, z, weight, groups); });
  });
  m.def("norm_backward", [](at::Tensor dout, at::Tensor y, at::Tensor z, at::Tensor weight, int64_t groups) {
    return of_type(y, [&](auto zero) { return backward<decltype(zero)>(dout, y, z, weight, groups); });
  });
}
