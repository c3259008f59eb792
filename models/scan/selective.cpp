// Mamba-1's selective scan on a CPU, forward and backward, fused with softplus, D skip and gate.
//
//   dt = softplus(r)      h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t      out_t = (C_t h_t + D x_t) silu(z_t)
//
// Channels are the vector lanes: activations lie channel-last, so loads are contiguous, B and C are scalars to a
// vector, and there is no reduction over lanes in the forward pass. States of one block of channels stay in the
// first-level cache; one state per CHUNK steps is kept, from which the backward pass recomputes the others.
//
// x, z and their like are float32 or bfloat16, everything else float32.
//
// Shapes: B batch, L time, D channels, N state; V lanes of a block of channels, G blocks, K steps of a chunk.

// Single headers instead of torch/extension.h: the build takes a quarter of the time.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "lanes.h"

namespace {

constexpr int CHUNK = 16;
constexpr int TILE = 4;

constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

// (D, N) -> (G, N, V), zero-padded: a block's A is contiguous. In units of log2(e), because the kernels use exp2.
at::Tensor to_blocks(const at::Tensor& A) {
  const int64_t D = A.size(0), N = A.size(1), G = (D + V - 1) / V;
  return at::constant_pad_nd(A.mul(LOG2E), {0, 0, 0, G * V - D}).view({G, V, N}).transpose(1, 2).contiguous();
}

// The inverse, for sums.
at::Tensor from_blocks(const at::Tensor& blocks, int64_t D) {
  const int64_t G = blocks.size(0), N = blocks.size(1);
  return blocks.transpose(1, 2).reshape({G * V, N}).slice(0, 0, D).contiguous();
}

// One chunk of one block: what does not depend on the state, for its steps.
struct Chunk {
  int64_t b, from, steps;
  vec dt[CHUNK], u[CHUNK], y[CHUNK];
};

// Sums over the steps of one block: squared states, squared decays, squared contributions to the output.
struct Sums {
  float *h2, *a2, *hc2;
  void add(int64_t i, vec more_h2, vec more_a2, vec more_hc2) const {
    store(h2 + i, load(h2 + i) + more_h2), store(a2 + i, load(a2 + i) + more_a2);
    store(hc2 + i, load(hc2 + i) + more_hc2);
  }
};

// What is kept of every step lies tile by tile, because rows of N states apart would share the sets of the cache.
inline int64_t slot(int64_t n, int64_t N, int64_t k) {
  const int64_t first = n / TILE * TILE, width = first + TILE <= N ? TILE : 1;
  return width == 1 ? (n * CHUNK + k) * V : (first * CHUNK + k * TILE + n - first) * V;
}

// Carries T states, beginning with n, through a chunk and adds C h to y. They live in registers, time runs inside.
// `h` and `decay`, where given, take the T states before each step and after the last one, and the T decays.
template <int T, bool with_moments>
inline void advance(Chunk& chunk, const Rows<float>& B, const Rows<float>& C, const float* A, float* state, int64_t n, vec* h,
                    vec* decay, const Sums& sums) {
  vec now[T], A_n[T], h2_n[T], a2_n[T], hc2_n[T];
  for (int j = 0; j < T; ++j) {
    now[j] = load(state + (n + j) * V), A_n[j] = load(A + (n + j) * V);
    if (h) h[j] = now[j];
    if (with_moments) h2_n[j] = a2_n[j] = hc2_n[j] = vec{};
  }
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const float *B_t = B.at(chunk.b, chunk.from + k) + n, *C_t = C.at(chunk.b, chunk.from + k) + n;
    const vec dt = chunk.dt[k], u = chunk.u[k];
    vec y = chunk.y[k];
    for (int j = 0; j < T; ++j) {
      const vec a = exp2_(dt * A_n[j]);
      now[j] = a * now[j] + u * B_t[j];
      y += now[j] * C_t[j];
      if (h) h[(k + 1) * T + j] = now[j], decay[k * T + j] = a;
      if (with_moments) {
        const vec h2 = now[j] * now[j];
        h2_n[j] += h2, a2_n[j] += a * a, hc2_n[j] += h2 * (C_t[j] * C_t[j]);
      }
    }
    chunk.y[k] = y;
  }
  for (int j = 0; j < T; ++j) {
    store(state + (n + j) * V, now[j]);
    if (with_moments) sums.add((n + j) * V, h2_n[j], a2_n[j], hc2_n[j]);
  }
}

template <bool with_moments, typename T>
void forward_block(const Rows<T>& x, const Rows<float>& r, const Rows<float>& B, const Rows<float>& C, const Rows<T>& z,
                   const float* A, const vec D, T* out, int64_t out_stride, float* starts, float* last, const Sums& sums,
                   int64_t b, int64_t first, int lanes, int64_t L, int64_t N) {
  std::vector<float> state(N * V, 0.f);
  Chunk chunk;
  for (int64_t from = 0; from < L; from += CHUNK) {
    std::memcpy(starts + from / CHUNK * N * V, state.data(), N * V * sizeof(float));
    chunk.b = b, chunk.from = from, chunk.steps = std::min<int64_t>(CHUNK, L - from);
    for (int64_t k = 0; k < chunk.steps; ++k) {
      const vec input = load(x.at(b, from + k) + first, lanes);
      chunk.dt[k] = softplus(load(r.at(b, from + k) + first, lanes));
      chunk.u[k] = chunk.dt[k] * input, chunk.y[k] = D * input;
    }
    int64_t n = 0;
    for (; n + TILE <= N; n += TILE) {
      advance<TILE, with_moments>(chunk, B, C, A, state.data(), n, nullptr, nullptr, sums);
    }
    for (; n < N; ++n) advance<1, with_moments>(chunk, B, C, A, state.data(), n, nullptr, nullptr, sums);
    for (int64_t k = 0; k < chunk.steps; ++k) {
      const vec gate = load(z.at(b, from + k) + first, lanes);
      store(out + (from + k) * out_stride, chunk.y[k] * gate * sigmoid(gate), lanes);
    }
  }
  if (with_moments) std::memcpy(last, state.data(), N * V * sizeof(float));
}

// Goes through a chunk with T states and back again: what is kept of every step stays in the first-level cache.
template <int T>
inline void retreat(Chunk& chunk, const vec* dy, vec* du, vec* dlog_A, const Rows<float>& B, const Rows<float>& C, const float* A,
                    float* state, float* carry, int64_t n, float* dA, float* dB, float* dC) {
  vec h[(CHUNK + 1) * T], decay[CHUNK * T], back[T], A_n[T], dA_n[T], after[T];
  advance<T, false>(chunk, B, C, A, state, n, h, decay, Sums{});
  for (int j = 0; j < T; ++j) {
    const int64_t i = (n + j) * V;
    back[j] = load(carry + i), A_n[j] = load(A + i), dA_n[j] = load(dA + i), after[j] = load(state + i);
  }
  for (int64_t k = chunk.steps - 1; k >= 0; --k) {
    const float *B_t = B.at(chunk.b, chunk.from + k) + n, *C_t = C.at(chunk.b, chunk.from + k) + n;
    const vec dt = chunk.dt[k], u = chunk.u[k], dy_k = dy[k];
    vec du_k = du[k], dlog_k = dlog_A[k];
    for (int j = 0; j < T; ++j) {
      const int64_t i = (n * CHUNK + k * T + j) * V;
      const vec dh = back[j] + dy_k * C_t[j], before = h[k * T + j];
      store(dC + i, load(dC + i) + dy_k * after[j]);
      store(dB + i, load(dB + i) + dh * u);
      du_k += dh * B_t[j];
      back[j] = dh * decay[k * T + j];
      const vec dlog = back[j] * before;  // the gradient of dt A
      dlog_k += dlog * A_n[j];
      dA_n[j] += dlog * dt;
      after[j] = before;
    }
    du[k] = du_k, dlog_A[k] = dlog_k;
  }
  for (int j = 0; j < T; ++j) store(carry + (n + j) * V, back[j]), store(dA + (n + j) * V, dA_n[j]);
}

template <typename T>
std::vector<at::Tensor> forward(const at::Tensor& x, const at::Tensor& r, const at::Tensor& A, const at::Tensor& B,
                                const at::Tensor& C, const at::Tensor& D, const at::Tensor& z, bool with_moments) {
  const int64_t batch = x.size(0), L = x.size(1), channels = x.size(2), N = A.size(1);
  const int64_t G = (channels + V - 1) / V, chunks = (L + CHUNK - 1) / CHUNK;
  const at::Tensor A_GNV = to_blocks(A), D_V = at::constant_pad_nd(D, {0, G * V - channels}).contiguous();
  at::Tensor out = at::empty({batch, L, channels}, x.options());
  at::Tensor starts = at::empty({batch, G, chunks, N, V}, A.options());
  at::Tensor sums = at::zeros({3, with_moments ? batch : 0, G, N, V}, A.options());
  at::Tensor last = at::empty({with_moments ? batch : 0, G, N, V}, A.options());
  const Rows<T> xs(x), zs(z);
  const Rows<float> rs(r), Bs(B), Cs(C);
  const float *A_ptr = A_GNV.data_ptr<float>(), *D_ptr = D_V.data_ptr<float>();
  T* out_ptr = out.data_ptr<T>();
  float* start_ptr = starts.data_ptr<float>();
  float *sums_ptr = sums.data_ptr<float>(), *last_ptr = last.data_ptr<float>();
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = g * V, block = b * G + g;
      const int lanes = std::min<int64_t>(V, channels - first);
      const auto run = with_moments ? forward_block<true, T> : forward_block<false, T>;
      const int64_t size = batch * G * N * V;
      float* own = sums_ptr + block * N * V;
      run(xs, rs, Bs, Cs, zs, A_ptr + g * N * V, load(D_ptr + first), out_ptr + b * L * channels + first, channels,
          start_ptr + block * chunks * N * V, last_ptr + block * N * V,
          with_moments ? Sums{own, own + size, own + 2 * size} : Sums{}, b, first, lanes, L, N);
    }
  }
  if (!with_moments) return {out, starts};
  // Each sequence is summed in float32, the sequences in float64.
  const at::Tensor totals = sums.sum(1, false, at::kDouble);
  return {out, starts, from_blocks(totals[0], channels), from_blocks(totals[1], channels),
          from_blocks(totals[2], channels), last};
}

template <typename T>
std::vector<at::Tensor> backward(const at::Tensor& dout, const at::Tensor& x, const at::Tensor& r, const at::Tensor& A,
                                 const at::Tensor& B, const at::Tensor& C, const at::Tensor& D, const at::Tensor& z,
                                 const at::Tensor& starts) {
  const int64_t batch = x.size(0), L = x.size(1), channels = x.size(2), N = A.size(1);
  const int64_t G = (channels + V - 1) / V, chunks = (L + CHUNK - 1) / CHUNK, NV = N * V;
  const int64_t threads = at::get_num_threads();
  // B and C belong to all channels, so their gradients are summed over blocks: a task takes a range of blocks of one
  // sequence, and sums of its own.
  const int64_t ranges = std::min<int64_t>(G, (threads + batch - 1) / batch);
  const at::Tensor A_GNV = to_blocks(A), D_V = at::constant_pad_nd(D, {0, G * V - channels}).contiguous();
  at::Tensor dx = at::empty({batch, L, channels}, x.options());
  at::Tensor dr = at::empty({batch, L, channels}, r.options()), dz = at::empty_like(dx);
  at::Tensor dA = at::zeros({batch, G, N, V}, A.options()), dD = at::zeros({batch, G * V}, A.options());
  at::Tensor dB = at::empty({ranges, batch, L, N}, B.options()), dC = at::empty_like(dB);
  const Rows<T> gs(dout), xs(x), zs(z);
  const Rows<float> rs(r), Bs(B), Cs(C);
  const float *A_ptr = A_GNV.data_ptr<float>(), *D_ptr = D_V.data_ptr<float>(), *start_ptr = starts.data_ptr<float>();
  T *dx_ptr = dx.data_ptr<T>(), *dz_ptr = dz.data_ptr<T>();
  float* dr_ptr = dr.data_ptr<float>();
  float *dA_ptr = dA.data_ptr<float>(), *dD_ptr = dD.data_ptr<float>();
  float *dB_ptr = dB.data_ptr<float>(), *dC_ptr = dC.data_ptr<float>();
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t range = 0; range < ranges; ++range) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t g_first = range * G / ranges, g_last = (range + 1) * G / ranges;
      std::vector<float> carries((g_last - g_first) * NV, 0.f), state(NV);
      std::vector<float> dB_lanes(CHUNK * NV), dC_lanes(CHUNK * NV);
      Chunk chunk;
      vec dy[CHUNK], du[CHUNK], dlog[CHUNK], inputs[CHUNK], slopes[CHUNK], gates[CHUNK], open[CHUNK], grads[CHUNK];
      for (int64_t index = chunks - 1; index >= 0; --index) {
        const int64_t from = index * CHUNK, steps = std::min<int64_t>(CHUNK, L - from);
        chunk.b = b, chunk.from = from, chunk.steps = steps;
        std::fill(dB_lanes.begin(), dB_lanes.end(), 0.f);
        std::fill(dC_lanes.begin(), dC_lanes.end(), 0.f);
        for (int64_t g = g_first; g < g_last; ++g) {
          const int64_t first = g * V;
          const int lanes = std::min<int64_t>(V, channels - first);
          const float* A_block = A_ptr + g * NV;
          const vec D_block = load(D_ptr + first);
          for (int64_t k = 0; k < steps; ++k) {
            const vec raw = load(rs.at(b, from + k) + first, lanes);
            inputs[k] = load(xs.at(b, from + k) + first, lanes);
            chunk.dt[k] = softplus(raw, &slopes[k]);
            chunk.u[k] = chunk.dt[k] * inputs[k], chunk.y[k] = D_block * inputs[k];
          }
          const float* start = start_ptr + ((b * G + g) * chunks + index) * NV;
          std::memcpy(state.data(), start, NV * sizeof(float));
          for (int64_t k = 0; k < steps; ++k) {
            gates[k] = load(zs.at(b, from + k) + first, lanes), open[k] = sigmoid(gates[k]);
            grads[k] = load(gs.at(b, from + k) + first, lanes);
            dy[k] = grads[k] * gates[k] * open[k], du[k] = dlog[k] = vec{};
          }
          float *carry = carries.data() + (g - g_first) * NV, *dA_block = dA_ptr + (b * G + g) * NV;
          int64_t n = 0;
          for (; n + TILE <= N; n += TILE) {
            retreat<TILE>(chunk, dy, du, dlog, Bs, Cs, A_block, state.data(), carry, n, dA_block, dB_lanes.data(),
                          dC_lanes.data());
          }
          for (; n < N; ++n) {
            retreat<1>(chunk, dy, du, dlog, Bs, Cs, A_block, state.data(), carry, n, dA_block, dB_lanes.data(),
                       dC_lanes.data());
          }
          vec dD_block = load(dD_ptr + b * G * V + first);
          for (int64_t k = 0; k < steps; ++k) {
            const int64_t place = (b * L + from + k) * channels + first;
            store(dz_ptr + place, grads[k] * chunk.y[k] * open[k] * (1.f + gates[k] * (1.f - open[k])), lanes);
            dD_block += dy[k] * inputs[k];
            store(dx_ptr + place, du[k] * chunk.dt[k] + dy[k] * D_block, lanes);
            store(dr_ptr + place, (dlog[k] * LN2 + du[k] * inputs[k]) * slopes[k], lanes);
          }
          store(dD_ptr + b * G * V + first, dD_block);
        }
        for (int64_t k = 0; k < steps; ++k) {
          for (int64_t n = 0; n < N; ++n) {
            const int64_t place = ((range * batch + b) * L + from + k) * N + n;
            dB_ptr[place] = sum(load(dB_lanes.data() + slot(n, N, k)));
            dC_ptr[place] = sum(load(dC_lanes.data() + slot(n, N, k)));
          }
        }
      }
    }
  }
  const at::Tensor dD_D = dD.sum(0).slice(0, 0, channels).contiguous();
  return {dx, dr, from_blocks(dA.sum(0), channels), dB.sum(0), dC.sum(0), dD_D, dz};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rayduce, m) {
  m.def("selective_forward", [](at::Tensor x, at::Tensor r, at::Tensor A, at::Tensor B, at::Tensor C, at::Tensor D,
                                at::Tensor z, bool with_moments) {
    return of_type(x, [&](auto zero) { return forward<decltype(zero)>(x, r, A, B, C, D, z, with_moments); });
  });
  m.def("selective_backward", [](at::Tensor dout, at::Tensor x, at::Tensor r, at::Tensor A, at::Tensor B, at::Tensor C,
                                 at::Tensor D, at::Tensor z, at::Tensor starts) {
    return of_type(x, [&](auto zero) { return backward<decltype(zero)>(dout, x, r, A, B, C, D, z, starts); });
  });
}
