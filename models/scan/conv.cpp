// Mamba's depthwise causal convolution with SiLU on a CPU, forward and backward, channel-last.
//
//   s_t = bias + sum_w weight_w x_(t - W + 1 + w)      out_t = silu(s_t)
//
// A task takes ROWS time steps of one sequence: the rows that it reads stay in cache. The backward pass computes s
// again, also for the W - 1 steps after its own, which its own inputs reach.
//
// x and its like are float32 or bfloat16, everything else float32.
//
// Shapes: B batch, L time, D channels, W width of the filter; V lanes of a block of channels, padded to P channels.

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t ROWS = 32;

// (D, W) -> (W, P), zero-padded: one tap of all channels is contiguous.
at::Tensor to_taps(const at::Tensor& weight) {
  const int64_t D = weight.size(0), P = (D + V - 1) / V * V;
  return at::constant_pad_nd(weight, {0, 0, 0, P - D}).t().contiguous();
}

template <typename T>
inline vec convolve(const Rows<T>& x, const float* taps, vec bias, int64_t b, int64_t t, int64_t first, int lanes,
                    int64_t W, int64_t P) {
  vec s = bias;
  for (int64_t w = std::max<int64_t>(0, W - 1 - t); w < W; ++w) {
    s += load(x.at(b, t - W + 1 + w) + first, lanes) * load(taps + w * P + first);
  }
  return s;
}

template <typename T>
at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t batch = x.size(0), L = x.size(1), D = x.size(2), W = weight.size(1);
  const at::Tensor taps = to_taps(weight);
  const int64_t P = taps.size(1);
  const at::Tensor padded = at::constant_pad_nd(bias, {0, P - D}).contiguous();
  at::Tensor out = at::empty({batch, L, D}, x.options());
  const Rows<T> xs(x);
  const float *taps_ptr = taps.data_ptr<float>(), *bias_ptr = padded.data_ptr<float>();
  T* out_ptr = out.data_ptr<T>();
#pragma omp parallel for collapse(2) num_threads(at::get_num_threads())
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t from = 0; from < L; from += ROWS) {
      for (int64_t t = from; t < std::min(from + ROWS, L); ++t) {
        for (int64_t first = 0; first < D; first += V) {
          const int lanes = std::min<int64_t>(V, D - first);
          const vec s = convolve(xs, taps_ptr, load(bias_ptr + first), b, t, first, lanes, W, P);
          store(out_ptr + (b * L + t) * D + first, s * sigmoid(s), lanes);
        }
      }
    }
  }
  return out;
}

template <typename T>
std::vector<at::Tensor> backward(const at::Tensor& dout, const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& bias) {
  const int64_t batch = x.size(0), L = x.size(1), D = x.size(2), W = weight.size(1);
  const int64_t tasks = (L + ROWS - 1) / ROWS;
  const at::Tensor taps = to_taps(weight);
  const int64_t P = taps.size(1);
  const at::Tensor padded = at::constant_pad_nd(bias, {0, P - D}).contiguous();
  at::Tensor dx = at::empty({batch, L, D}, x.options());
  // The last row of a task's sums is the bias.
  at::Tensor sums = at::zeros({batch * tasks, W + 1, P}, weight.options());
  const Rows<T> xs(x), gs(dout);
  const float *taps_ptr = taps.data_ptr<float>(), *bias_ptr = padded.data_ptr<float>();
  T* dx_ptr = dx.data_ptr<T>();
  float* sums_ptr = sums.data_ptr<float>();
#pragma omp parallel for collapse(2) num_threads(at::get_num_threads())
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t from = task * ROWS, to = std::min(from + ROWS, L), reach = std::min(to + W - 1, L);
      std::vector<float> slopes((reach - from) * P);
      float* own = sums_ptr + (b * tasks + task) * (W + 1) * P;
      for (int64_t t = from; t < reach; ++t) {
        for (int64_t first = 0; first < D; first += V) {
          const int lanes = std::min<int64_t>(V, D - first);
          const vec s = convolve(xs, taps_ptr, load(bias_ptr + first), b, t, first, lanes, W, P);
          const vec open = sigmoid(s);
          const vec ds = load(gs.at(b, t) + first, lanes) * open * (1.f + s * (1.f - open));
          store(slopes.data() + (t - from) * P + first, ds);
          if (t >= to) continue;
          for (int64_t w = std::max<int64_t>(0, W - 1 - t); w < W; ++w) {
            float* sum = own + w * P + first;
            store(sum, load(sum) + ds * load(xs.at(b, t - W + 1 + w) + first, lanes));
          }
          store(own + W * P + first, load(own + W * P + first) + ds);
        }
      }
      for (int64_t t = from; t < to; ++t) {
        for (int64_t first = 0; first < D; first += V) {
          vec total{};
          for (int64_t w = 0; w < W && t + w < reach; ++w) {
            total += load(slopes.data() + (t + w - from) * P + first) * load(taps_ptr + (W - 1 - w) * P + first);
          }
          store(dx_ptr + (b * L + t) * D + first, total, std::min<int64_t>(V, D - first));
        }
      }
    }
  }
  const at::Tensor totals = sums.sum(0).slice(1, 0, D);
  return {dx, totals.slice(0, 0, W).t().contiguous(), totals.select(0, W).contiguous()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rayduce, m) {
  m.def("conv_forward", [](at::Tensor x, at::Tensor weight, at::Tensor bias) {
    return of_type(x, [&](auto zero) { return forward<decltype(zero)>(x, weight, bias); });
  });
  m.def("conv_backward", [](at::Tensor dout, at::Tensor x, at::Tensor weight, at::Tensor bias) {
    return of_type(x, [&](auto zero) { return backward<decltype(zero)>(dout, x, weight, bias); });
  });
}
