// Vectors of channels, and the functions of them that the kernels share.
//
// GCC's and Clang's vector type is lowered to whatever the processor has (AVX-512, AVX2, NEON).

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int V = 16;
typedef float vec __attribute__((vector_size(V * sizeof(float))));
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

// 2^x for x <= 0, to 2 units in the last place; 0 to rounding below -126. Adding the shifter rounds to an integer, whose
// bits then lie where the exponent goes; the polynomial fits 2^f on [-1/2, 1/2] with a relative error of 1e-7.
inline vec exp2_(vec x) {
  const vec clamped = x > -126.f ? x : all(-126.f);
  const vec shifted = clamped + 12582912.f;
  const vec f = clamped - (shifted - 12582912.f);
  vec p = f * 1.533757678e-4f + 1.339986037e-3f;
  p = p * f + 9.618519534e-3f;
  p = p * f + 5.550328998e-2f;
  p = p * f + 2.402264661e-1f;
  p = p * f + 6.931472056e-1f;
  p = p * f + 1.f;
  const ivec bits = reinterpret_cast<const ivec&>(p) + (reinterpret_cast<const ivec&>(shifted) << 23);
  return reinterpret_cast<const vec&>(bits);
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

inline vec softplus(vec x) {
  const vec magnitude = x < 0.f ? -x : x;
  return (x > 0.f ? x : vec{}) + log1p_(exp_(-magnitude));
}

inline vec sigmoid(vec x) { return 1.f / (1.f + exp_(-x)); }

// A tensor (B, L, channels) whose last axis is contiguous; it may be a slice of a wider one.
struct Rows {
  const float* data;
  int64_t batch, time;
  explicit Rows(const at::Tensor& t) : data(t.data_ptr<float>()), batch(t.stride(0)), time(t.stride(1)) {
    TORCH_CHECK(t.dim() == 3 && t.stride(2) == 1 && t.scalar_type() == at::kFloat);
  }
  const float* at(int64_t b, int64_t t) const { return data + b * batch + t * time; }
};

}  // namespace
