// Vectors of channels, and the functions of them that the kernels share.
//
// GCC's and Clang's vector type is lowered to whatever the processor has (AVX-512, AVX2, NEON).

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// As wide as a register: GCC keeps what is wider in memory.
#ifdef __AVX512F__
constexpr int V = 16;
#else
constexpr int V = 8;
#endif
typedef float vec __attribute__((vector_size(V * sizeof(float))));
typedef uint16_t half __attribute__((vector_size(V * sizeof(uint16_t))));
typedef uint32_t uvec __attribute__((vector_size(V * sizeof(uint32_t))));
typedef int32_t ivec __attribute__((vector_size(V * sizeof(int32_t))));

inline vec all(float value) { return value - vec{}; }

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof(vec));
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof(vec)); }

// The last block of channels may be shorter; missing lanes are zero and stay zero.
inline vec load(const float* from, int lanes) {
  if (lanes == V) return load(from);
  vec value{};
  std::memcpy(&value, from, lanes * sizeof(float));
  return value;
}

inline void store(float* to, vec value, int lanes) { std::memcpy(to, &value, lanes * sizeof(float)); }

// bfloat16 is the upper half of a float32.
inline vec load(const at::BFloat16* from, int lanes) {
  half upper{};
  std::memcpy(&upper, from, lanes * sizeof(uint16_t));
  const uvec bits = __builtin_convertvector(upper, uvec) << 16;
  return reinterpret_cast<const vec&>(bits);
}

// Rounded to nearest, ties to even; NaN stays NaN.
inline void store(at::BFloat16* to, vec value, int lanes) {
  const uvec bits = reinterpret_cast<const uvec&>(value);
  const uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const half upper = __builtin_convertvector(value == value ? rounded : uvec{} + 0x7fc0u, half);
  std::memcpy(to, &upper, lanes * sizeof(uint16_t));
}

inline float sum(vec value) {
  float total = 0;
  for (int lane = 0; lane < V; ++lane) total += value[lane];
  return total;
}

// exp to 2 units in the last place: 2^round(x / ln 2) times a polynomial on the rest (Cody and Waite 1980).
// Below -87 the result would be subnormal: it is 0 there, above 88 it is held.
inline vec exp_(vec x) {
  const vec clamped = x < -87.f ? all(-87.f) : (x > 88.f ? all(88.f) : x);
  const vec shifter = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec shifted = clamped * 1.44269504f + shifter;
  const vec n = shifted - shifter;
  const vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const ivec scale = (reinterpret_cast<const ivec&>(shifted) + 127) << 23;
  const vec result = p * reinterpret_cast<const vec&>(scale);
  return x < -87.f ? vec{} : result;
}

// 2^x for x <= 0, to 3 units in the last place; 0 to rounding below -126. The polynomial fits 2^f on [-1/2, 1/2] with a
// relative error of 9e-8, and is exact at 0: what does not decay must not fade.
inline vec exp2_(vec x) {
  const vec clamped = x < -126.f ? all(-126.f) : x;  // NaN stays what it is
#ifdef __AVX512F__
  const vec n = reinterpret_cast<vec>(_mm512_roundscale_ps(reinterpret_cast<__m512>(clamped), 0));
#else
  const vec shifted = clamped + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = shifted - 12582912.f;
#endif
  const vec f = clamped - n;
  vec p = f * 1.326472437e-3f + 9.671513239e-3f;
  p = p * f + 5.550733756e-2f;
  p = p * f + 2.402224207e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.f;
#ifdef __AVX512F__
  return reinterpret_cast<vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // The integer's bits, shifted to where the exponent is.
  const ivec bits = reinterpret_cast<const ivec&>(p) + (reinterpret_cast<const ivec&>(shifted) << 23);
  return reinterpret_cast<const vec&>(bits);
#endif
}

// log(1 + x) for x in [0, 1], through the series of atanh(x / (2 + x)).
inline vec log1p_(vec x) {
  const vec s = x / (x + 2.f), s2 = s * s;
  vec p = s2 * (2.f / 15) + 2.f / 13;
  p = p * s2 + 2.f / 11;
  p = p * s2 + 2.f / 9;
  p = p * s2 + 2.f / 7;
  p = p * s2 + 2.f / 5;
  p = p * s2 + 2.f / 3;
  p = p * s2 + 2.f;
  return p * s;
}

inline vec sigmoid(vec x) { return 1.f / (1.f + exp_(-x)); }

// log(1 + exp(x)), and its slope, which is the sigmoid, from the same exponential.
inline vec softplus(vec x, vec* slope = nullptr) {
  const vec e = exp_(x < 0.f ? x : -x);
  if (slope) *slope = (x < 0.f ? e : all(1.f)) / (1.f + e);
  return (x > 0.f ? x : vec{}) + log1p_(e);
}

// A tensor (B, L, channels) whose last axis is contiguous; it may be a slice of a wider one.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch, time;
  explicit Rows(const at::Tensor& t) : data(t.data_ptr<T>()), batch(t.stride(0)), time(t.stride(1)) {
    TORCH_CHECK(t.dim() == 3 && t.stride(2) == 1);
  }
  const T* at(int64_t b, int64_t t) const { return data + b * batch + t * time; }
};

// Calls `run` with a zero of the tensor's type, which has to be float32 or bfloat16.
template <typename Run>
auto of_type(const at::Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == at::kBFloat16) return run(at::BFloat16{});
  return run(float{});
}

}  // namespace
