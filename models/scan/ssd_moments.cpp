// Carries the states of Mamba-2 through some steps, and sums the squares that its statistics are made of.
//
//   h_t = a_t h_(t-1) + u_t B_t      h2 = sum of h_t^2      hc2 = sum of (h_t C_t)^2
//
// Channels are the vector lanes. A tile of states stays in registers while time runs; decays belong to channels, so
// there is no exponential here.
//
// Everything is float32. Shapes: B batch, K steps, D channels, N state; V lanes of a block of channels, G blocks.

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "lanes.h"

namespace {

constexpr int TILE = 4;

// The states before the steps, then after them; and sums over the steps. Rows of D channels, N of them.
struct Place {
  float *state, *h2, *hc2;
};

template <int T>
inline void advance(const Place& place, const Rows<float>& a, const Rows<float>& u, const Rows<float>& B, const Rows<float>& C,
                    int64_t b, int64_t first, int lanes, int64_t n, int64_t K, int64_t D) {
  vec h[T], h2[T], hc2[T];
  for (int j = 0; j < T; ++j) h[j] = load(place.state + (n + j) * D, lanes), h2[j] = hc2[j] = vec{};
  for (int64_t k = 0; k < K; ++k) {
    const vec a_k = load(a.at(b, k) + first, lanes), u_k = load(u.at(b, k) + first, lanes);
    const float *B_k = B.at(b, k) + n, *C_k = C.at(b, k) + n;
    for (int j = 0; j < T; ++j) {
      h[j] = a_k * h[j] + u_k * B_k[j];
      const vec square = h[j] * h[j];
      h2[j] += square, hc2[j] += square * (C_k[j] * C_k[j]);
    }
  }
  for (int j = 0; j < T; ++j) {
    const int64_t row = (n + j) * D;
    store(place.state + row, h[j], lanes), store(place.h2 + row, h2[j], lanes), store(place.hc2 + row, hc2[j], lanes);
  }
}

std::vector<at::Tensor> moments(const at::Tensor& state, const at::Tensor& a, const at::Tensor& u, const at::Tensor& B,
                                const at::Tensor& C) {
  TORCH_CHECK(state.is_contiguous());
  const int64_t batch = state.size(0), N = state.size(1), D = state.size(2), K = a.size(1), G = (D + V - 1) / V;
  at::Tensor h2 = at::empty_like(state), hc2 = at::empty_like(state);
  const Rows<float> as(a), us(u), Bs(B), Cs(C);
  float *state_ptr = state.data_ptr<float>(), *h2_ptr = h2.data_ptr<float>(), *hc2_ptr = hc2.data_ptr<float>();
#pragma omp parallel for collapse(2) num_threads(at::get_num_threads())
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = g * V, start = b * N * D + first;
      const int lanes = std::min<int64_t>(V, D - first);
      const Place place{state_ptr + start, h2_ptr + start, hc2_ptr + start};
      int64_t n = 0;
      for (; n + TILE <= N; n += TILE) advance<TILE>(place, as, us, Bs, Cs, b, first, lanes, n, K, D);
      for (; n < N; ++n) advance<1>(place, as, us, Bs, Cs, b, first, lanes, n, K, D);
    }
  }
  return {h2, hc2};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rayduce, m) {
  m.def("ssd_moments(Tensor(a!) state, Tensor a, Tensor u, Tensor B, Tensor C) -> Tensor[]", &moments);
}
