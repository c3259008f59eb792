// Products of spectra on a CPU: a convolution of several channels, in the frequency domain.
//
//   mix:        y_bof = sum_i x_bif k_iof          correlate:  k_iof = sum_b conj(x_bif) y_bof
//
// Frequencies are contiguous, as FFTs give them, and stay so: as batched matrix products, one per frequency, the same
// costs several times the FFTs, most of it for bringing frequencies to the front.
//
// Shapes: B batch, I channels in, O channels out, F frequencies; complex64 as pairs of floats.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "lanes.h"

namespace {

// Frequencies of a block: a multiple of the lanes. All factors of a block stay in the first-level cache.
constexpr int64_t BLOCK = 2 * V;

struct Planes {
  vec re[2], im[2];
};

// Takes at most BLOCK pairs apart; the rest is zero.
inline Planes split(const float* pairs, int64_t count) {
  alignas(sizeof(vec)) float re[BLOCK] = {}, im[BLOCK] = {};
  if (count == BLOCK) {  // a loop of known length becomes vector instructions
    for (int64_t f = 0; f < BLOCK; ++f) re[f] = pairs[2 * f], im[f] = pairs[2 * f + 1];
  } else {
    for (int64_t f = 0; f < count; ++f) re[f] = pairs[2 * f], im[f] = pairs[2 * f + 1];
  }
  return {{load(re), load(re + V)}, {load(im), load(im + V)}};
}

inline void join(const Planes& planes, float* pairs, int64_t count) {
  alignas(sizeof(vec)) float re[BLOCK], im[BLOCK];
  for (int j = 0; j < 2; ++j) store(re + j * V, planes.re[j]), store(im + j * V, planes.im[j]);
  if (count == BLOCK) {
    for (int64_t f = 0; f < BLOCK; ++f) pairs[2 * f] = re[f], pairs[2 * f + 1] = im[f];
  } else {
    for (int64_t f = 0; f < count; ++f) pairs[2 * f] = re[f], pairs[2 * f + 1] = im[f];
  }
}

// sum += a b, or conj(a) b.
template <bool conjugate>
inline void multiply_add(Planes& sum, const Planes& a, const Planes& b) {
  for (int j = 0; j < 2; ++j) {
    const vec im = conjugate ? -a.im[j] : a.im[j];
    sum.re[j] += a.re[j] * b.re[j] - im * b.im[j];
    sum.im[j] += a.re[j] * b.im[j] + im * b.re[j];
  }
}

// A contiguous complex64 tensor (rows, columns, F).
struct Spectra {
  float* data;
  int64_t columns, F;
  explicit Spectra(const at::Tensor& t)
      : data(reinterpret_cast<float*>(t.data_ptr<c10::complex<float>>())), columns(t.size(1)), F(t.size(2)) {
    TORCH_CHECK(t.dim() == 3 && t.is_contiguous());
  }
  float* at(int64_t row, int64_t column, int64_t f) const { return data + 2 * ((row * columns + column) * F + f); }
};

at::Tensor mix(at::Tensor x, at::Tensor k) {
  const int64_t B = x.size(0), I = x.size(1), F = x.size(2), O = k.size(1);
  at::Tensor y = at::empty({B, O, F}, x.options());
  const Spectra xs(x), ks(k), ys(y);
#pragma omp parallel for num_threads(at::get_num_threads())
  for (int64_t from = 0; from < F; from += BLOCK) {
    const int64_t count = std::min(BLOCK, F - from);
    std::vector<Planes> factors(O * I), inputs(I);
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t i = 0; i < I; ++i) factors[o * I + i] = split(ks.at(i, o, from), count);
    }
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < I; ++i) inputs[i] = split(xs.at(b, i, from), count);
      for (int64_t o = 0; o < O; ++o) {
        Planes sum{};
        for (int64_t i = 0; i < I; ++i) multiply_add<false>(sum, inputs[i], factors[o * I + i]);
        join(sum, ys.at(b, o, from), count);
      }
    }
  }
  return y;
}

at::Tensor correlate(at::Tensor x, at::Tensor y) {
  const int64_t B = x.size(0), I = x.size(1), F = x.size(2), O = y.size(1);
  at::Tensor k = at::empty({I, O, F}, x.options());
  const Spectra xs(x), ys(y), ks(k);
#pragma omp parallel for num_threads(at::get_num_threads())
  for (int64_t from = 0; from < F; from += BLOCK) {
    const int64_t count = std::min(BLOCK, F - from);
    std::vector<Planes> sums(I * O), outputs(O);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t o = 0; o < O; ++o) outputs[o] = split(ys.at(b, o, from), count);
      for (int64_t i = 0; i < I; ++i) {
        const Planes input = split(xs.at(b, i, from), count);
        for (int64_t o = 0; o < O; ++o) multiply_add<true>(sums[i * O + o], input, outputs[o]);
      }
    }
    for (int64_t i = 0; i < I; ++i) {
      for (int64_t o = 0; o < O; ++o) join(sums[i * O + o], ks.at(i, o, from), count);
    }
  }
  return k;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rayduce, m) {
  m.def("spectral_mix", &mix);
  m.def("spectral_correlate", &correlate);
}
