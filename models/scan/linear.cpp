// The diagonal complex recurrence h_t = a h_(t-1) + u_t on a CPU, forward and backward, in real arithmetic.
//
// States are the vector lanes, channel-last as the projections around it give and take them. A task carries a few
// vectors of states of one sequence, which hide each other's latency, through all its time steps.
//
// Shapes: B batch, L time, N state; V lanes of a vector.

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "lanes.h"

namespace {

constexpr int GROUP = 4;

struct Vectors {
  int64_t first;  // state
  int lanes;      // of the last vector
};

template <int T>
void forward_states(const Rows<float>& u_re, const Rows<float>& u_im, const float* a_re, const float* a_im, float* h_re, float* h_im,
                    int64_t b, int64_t L, int64_t N, Vectors at) {
  vec re[T], im[T], decay_re[T], decay_im[T];
  for (int j = 0; j < T; ++j) {
    re[j] = im[j] = vec{};
    decay_re[j] = load(a_re + at.first + j * V), decay_im[j] = load(a_im + at.first + j * V);
  }
  for (int64_t t = 0; t < L; ++t) {
    const float *in_re = u_re.at(b, t) + at.first, *in_im = u_im.at(b, t) + at.first;
    const int64_t out = (b * L + t) * N + at.first;
    for (int j = 0; j < T; ++j) {
      const int lanes = j + 1 < T ? V : at.lanes;
      const vec before = re[j];
      re[j] = load(in_re + j * V, lanes) + decay_re[j] * before - decay_im[j] * im[j];
      im[j] = load(in_im + j * V, lanes) + decay_re[j] * im[j] + decay_im[j] * before;
      store(h_re + out + j * V, re[j], lanes), store(h_im + out + j * V, im[j], lanes);
    }
  }
}

// g_t = dh_t + conj(a) g_(t+1) is the gradient of u_t, and a's is the sum of g_t conj(h_(t-1)).
template <int T>
void backward_states(const Rows<float>& dh_re, const Rows<float>& dh_im, const Rows<float>& h_re, const Rows<float>& h_im, const float* a_re,
                     const float* a_im, float* du_re, float* du_im, float* da_re, float* da_im, int64_t b, int64_t L,
                     int64_t N, Vectors at) {
  vec re[T], im[T], decay_re[T], decay_im[T], sum_re[T], sum_im[T];
  for (int j = 0; j < T; ++j) {
    re[j] = im[j] = sum_re[j] = sum_im[j] = vec{};
    decay_re[j] = load(a_re + at.first + j * V), decay_im[j] = load(a_im + at.first + j * V);
  }
  for (int64_t t = L - 1; t >= 0; --t) {
    const float *in_re = dh_re.at(b, t) + at.first, *in_im = dh_im.at(b, t) + at.first;
    const int64_t out = (b * L + t) * N + at.first;
    for (int j = 0; j < T; ++j) {
      const int lanes = j + 1 < T ? V : at.lanes;
      const vec after = re[j];
      re[j] = load(in_re + j * V, lanes) + decay_re[j] * after + decay_im[j] * im[j];
      im[j] = load(in_im + j * V, lanes) + decay_re[j] * im[j] - decay_im[j] * after;
      store(du_re + out + j * V, re[j], lanes), store(du_im + out + j * V, im[j], lanes);
      if (t > 0) {
        const vec last_re = load(h_re.at(b, t - 1) + at.first + j * V, lanes);
        const vec last_im = load(h_im.at(b, t - 1) + at.first + j * V, lanes);
        sum_re[j] += re[j] * last_re + im[j] * last_im;
        sum_im[j] += im[j] * last_re - re[j] * last_im;
      }
    }
  }
  for (int j = 0; j < T; ++j) store(da_re + at.first + j * V, sum_re[j]), store(da_im + at.first + j * V, sum_im[j]);
}

// Calls `wide` for groups of GROUP vectors and `narrow` for the vectors that are left, of every sequence.
template <typename Wide, typename Narrow>
void for_all(int64_t batch, int64_t N, const Wide& wide, const Narrow& narrow) {
  const int64_t groups = N / (GROUP * V), rest = (N - groups * GROUP * V + V - 1) / V;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < groups + rest; ++i) {
      if (i < groups) {
        wide(b, Vectors{i * GROUP * V, V});
      } else {
        const int64_t first = groups * GROUP * V + (i - groups) * V;
        narrow(b, Vectors{first, static_cast<int>(std::min<int64_t>(V, N - first))});
      }
    }
  }
}

at::Tensor padded(const at::Tensor& a) { return at::constant_pad_nd(a, {0, (V - a.size(0) % V) % V}).contiguous(); }

std::vector<at::Tensor> forward(at::Tensor a_re, at::Tensor a_im, at::Tensor u_re, at::Tensor u_im) {
  const int64_t batch = u_re.size(0), L = u_re.size(1), N = u_re.size(2);
  const at::Tensor decay_re = padded(a_re), decay_im = padded(a_im);
  at::Tensor h_re = at::empty({batch, L, N}, u_re.options()), h_im = at::empty({batch, L, N}, u_re.options());
  const Rows<float> re(u_re), im(u_im);
  const float *are = decay_re.data_ptr<float>(), *aim = decay_im.data_ptr<float>();
  float *hre = h_re.data_ptr<float>(), *him = h_im.data_ptr<float>();
  for_all(
      batch, N, [&](int64_t b, Vectors at) { forward_states<GROUP>(re, im, are, aim, hre, him, b, L, N, at); },
      [&](int64_t b, Vectors at) { forward_states<1>(re, im, are, aim, hre, him, b, L, N, at); });
  return {h_re, h_im};
}

std::vector<at::Tensor> backward(at::Tensor dh_re, at::Tensor dh_im, at::Tensor a_re, at::Tensor a_im, at::Tensor h_re,
                                 at::Tensor h_im) {
  const int64_t batch = h_re.size(0), L = h_re.size(1), N = h_re.size(2);
  const at::Tensor decay_re = padded(a_re), decay_im = padded(a_im);
  const int64_t P = decay_re.size(0);
  at::Tensor du_re = at::empty({batch, L, N}, h_re.options()), du_im = at::empty({batch, L, N}, h_re.options());
  at::Tensor da_re = at::empty({batch, P}, h_re.options()), da_im = at::empty({batch, P}, h_re.options());
  const Rows<float> gre(dh_re), gim(dh_im), hre(h_re), him(h_im);
  const float *are = decay_re.data_ptr<float>(), *aim = decay_im.data_ptr<float>();
  float *dure = du_re.data_ptr<float>(), *duim = du_im.data_ptr<float>();
  float *dare = da_re.data_ptr<float>(), *daim = da_im.data_ptr<float>();
  for_all(
      batch, N,
      [&](int64_t b, Vectors at) {
        backward_states<GROUP>(gre, gim, hre, him, are, aim, dure, duim, dare + b * P, daim + b * P, b, L, N, at);
      },
      [&](int64_t b, Vectors at) {
        backward_states<1>(gre, gim, hre, him, are, aim, dure, duim, dare + b * P, daim + b * P, b, L, N, at);
      });
  return {du_re, du_im, da_re.sum(0).slice(0, 0, N), da_im.sum(0).slice(0, 0, N)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rayduce, m) {
  m.def("linear_forward", &forward);
  m.def("linear_backward", &backward);
}
