// Mamba-1's selective scan on a CPU, forward and backward, fused with softplus, D skip and gate.
//
//   dt = softplus(r)      h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t      out_t = (C_t h_t + D x_t) silu(z_t)
//
// Channels are the vector lanes: activations lie channel-last, so loads are contiguous, B and C are scalars to a
// vector, and there is no reduction over lanes in the forward pass. States of one block of channels stay in the
// first-level cache; one state per CHUNK steps is kept, from which the backward pass recomputes the others.
//
// Shapes: B batch, L time, D channels, N state; V lanes of a block of channels, G blocks, K steps of a chunk.

// Single headers instead of torch/extension.h: the build takes a quarter of the time.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "lanes.h"

namespace {

constexpr int CHUNK = 16;

// (D, N) -> (G, N, V), zero-padded: a block's A is contiguous.
at::Tensor to_blocks(const at::Tensor& A) {
  const int64_t D = A.size(0), N = A.size(1), G = (D + V - 1) / V;
  return at::constant_pad_nd(A, {0, 0, 0, G * V - D}).view({G, V, N}).transpose(1, 2).contiguous();
}

// The inverse, for sums.
at::Tensor from_blocks(const at::Tensor& blocks, int64_t D) {
  const int64_t G = blocks.size(0), N = blocks.size(1);
  return blocks.transpose(1, 2).reshape({G * V, N}).slice(0, 0, D).contiguous();
}

template <bool with_moments>
void forward_block(const Rows& x, const Rows& r, const Rows& B, const Rows& C, const Rows& z, const float* A,
                   const vec D, float* out, int64_t out_stride, float* starts, int64_t start_stride, float* h2,
                   float* a2, int64_t b, int64_t first, int lanes, int64_t L, int64_t N) {
  std::vector<float> state(N * V, 0.f);
  float* h = state.data();
  for (int64_t t = 0; t < L; ++t) {
    if (t % CHUNK == 0) std::memcpy(starts + (t / CHUNK) * start_stride, h, N * V * sizeof(float));
    const vec dt = softplus(load(r.at(b, t) + first, lanes));
    const vec input = load(x.at(b, t) + first, lanes);
    const vec u = dt * input;
    const float *Bt = B.at(b, t), *Ct = C.at(b, t);
    vec y = D * input;
    for (int64_t n = 0; n < N; ++n) {
      const vec a = exp_(dt * load(A + n * V));
      const vec next = a * load(h + n * V) + u * Bt[n];
      store(h + n * V, next);
      y += next * Ct[n];
      if (with_moments) {
        store(h2 + n * V, load(h2 + n * V) + next * next);
        store(a2 + n * V, load(a2 + n * V) + a * a);
      }
    }
    const vec gate = load(z.at(b, t) + first, lanes);
    store(out + t * out_stride, y * gate * sigmoid(gate), lanes);
  }
}

std::vector<at::Tensor> forward(at::Tensor x, at::Tensor r, at::Tensor A, at::Tensor B, at::Tensor C,
                                   at::Tensor D, at::Tensor z, bool with_moments) {
  const int64_t batch = x.size(0), L = x.size(1), channels = x.size(2), N = A.size(1);
  const int64_t G = (channels + V - 1) / V, chunks = (L + CHUNK - 1) / CHUNK;
  const at::Tensor A_GNV = to_blocks(A), D_V = at::constant_pad_nd(D, {0, G * V - channels}).contiguous();
  at::Tensor out = at::empty({batch, L, channels}, x.options());
  at::Tensor starts = at::empty({batch, G, chunks, N, V}, x.options());
  at::Tensor h2 = at::zeros({with_moments ? batch : 0, G, N, V}, x.options()), a2 = at::zeros_like(h2);
  const Rows xs(x), rs(r), Bs(B), Cs(C), zs(z);
  const float *A_ptr = A_GNV.data_ptr<float>(), *D_ptr = D_V.data_ptr<float>();
  float *out_ptr = out.data_ptr<float>(), *start_ptr = starts.data_ptr<float>();
  float *h2_ptr = h2.data_ptr<float>(), *a2_ptr = a2.data_ptr<float>();
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = g * V, block = b * G + g;
      const int lanes = std::min<int64_t>(V, channels - first);
      const auto run = with_moments ? forward_block<true> : forward_block<false>;
      const int64_t sums = with_moments ? block * N * V : 0;
      run(xs, rs, Bs, Cs, zs, A_ptr + g * N * V, load(D_ptr + first), out_ptr + b * L * channels + first, channels,
          start_ptr + block * chunks * N * V, N * V, h2_ptr + sums, a2_ptr + sums, b, first, lanes, L, N);
    }
  }
  if (!with_moments) return {out, starts};
  // Each sequence is summed in float32, the sequences in float64.
  return {out, starts, from_blocks(h2.sum(0, false, at::kDouble), channels),
          from_blocks(a2.sum(0, false, at::kDouble), channels)};
}

std::vector<at::Tensor> backward(at::Tensor dout, at::Tensor x, at::Tensor r, at::Tensor A,
                                    at::Tensor B, at::Tensor C, at::Tensor D, at::Tensor z,
                                    at::Tensor starts) {
  const int64_t batch = x.size(0), L = x.size(1), channels = x.size(2), N = A.size(1);
  const int64_t G = (channels + V - 1) / V, chunks = (L + CHUNK - 1) / CHUNK, NV = N * V;
  const int64_t threads = at::get_num_threads();
  // B and C belong to all channels, so their gradients are summed over blocks: a task takes a range of blocks of one
  // sequence, and sums of its own.
  const int64_t ranges = std::min<int64_t>(G, (threads + batch - 1) / batch);
  const at::Tensor A_GNV = to_blocks(A), D_V = at::constant_pad_nd(D, {0, G * V - channels}).contiguous();
  at::Tensor dx = at::empty({batch, L, channels}, x.options());
  at::Tensor dr = at::empty_like(dx), dz = at::empty_like(dx);
  at::Tensor dA = at::zeros({batch, G, N, V}, x.options()), dD = at::zeros({batch, G * V}, x.options());
  at::Tensor dB = at::empty({ranges, batch, L, N}, x.options()), dC = at::empty_like(dB);
  const Rows gs(dout), xs(x), rs(r), Bs(B), Cs(C), zs(z);
  const float *A_ptr = A_GNV.data_ptr<float>(), *D_ptr = D_V.data_ptr<float>(), *start_ptr = starts.data_ptr<float>();
  float *dx_ptr = dx.data_ptr<float>(), *dr_ptr = dr.data_ptr<float>(), *dz_ptr = dz.data_ptr<float>();
  float *dA_ptr = dA.data_ptr<float>(), *dD_ptr = dD.data_ptr<float>();
  float *dB_ptr = dB.data_ptr<float>(), *dC_ptr = dC.data_ptr<float>();
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t range = 0; range < ranges; ++range) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t g_first = range * G / ranges, g_last = (range + 1) * G / ranges;
      std::vector<float> carries((g_last - g_first) * NV, 0.f), states((CHUNK + 1) * NV), decays(CHUNK * NV);
      std::vector<float> dB_lanes(CHUNK * NV), dC_lanes(CHUNK * NV);
      vec dts[CHUNK], us[CHUNK], dys[CHUNK], slopes[CHUNK], inputs[CHUNK];
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t from = chunk * CHUNK, steps = std::min<int64_t>(CHUNK, L - from);
        std::fill(dB_lanes.begin(), dB_lanes.end(), 0.f);
        std::fill(dC_lanes.begin(), dC_lanes.end(), 0.f);
        for (int64_t g = g_first; g < g_last; ++g) {
          const int64_t first = g * V;
          const int lanes = std::min<int64_t>(V, channels - first);
          const float* A_block = A_ptr + g * NV;
          const vec D_block = load(D_ptr + first);
          float *carry = carries.data() + (g - g_first) * NV, *h = states.data(), *decay = decays.data();
          std::memcpy(h, start_ptr + ((b * G + g) * chunks + chunk) * NV, NV * sizeof(float));
          vec dD_block{};
          for (int64_t k = 0; k < steps; ++k) {
            const int64_t t = from + k, place = (b * L + t) * channels + first;
            const vec raw = load(rs.at(b, t) + first, lanes), input = load(xs.at(b, t) + first, lanes);
            const vec dt = softplus(raw), u = dt * input;
            const float *Bt = Bs.at(b, t), *Ct = Cs.at(b, t);
            const float* before = h + k * NV;
            float *after = h + (k + 1) * NV, *a_k = decay + k * NV;
            vec y = D_block * input;
            for (int64_t n = 0; n < N; ++n) {
              const vec a = exp_(dt * load(A_block + n * V));
              const vec next = a * load(before + n * V) + u * Bt[n];
              store(a_k + n * V, a);
              store(after + n * V, next);
              y += next * Ct[n];
            }
            const vec gate = load(zs.at(b, t) + first, lanes), grad = load(gs.at(b, t) + first, lanes);
            const vec open = sigmoid(gate);
            store(dz_ptr + place, grad * y * open * (1.f + gate * (1.f - open)), lanes);
            dys[k] = grad * gate * open;
            dD_block += dys[k] * input;
            dts[k] = dt, us[k] = u, inputs[k] = input, slopes[k] = sigmoid(raw);
          }
          for (int64_t k = steps - 1; k >= 0; --k) {
            const int64_t t = from + k, place = (b * L + t) * channels + first;
            const vec dt = dts[k], u = us[k], dy = dys[k];
            const float *Bt = Bs.at(b, t), *Ct = Cs.at(b, t);
            const float *before = h + k * NV, *after = h + (k + 1) * NV, *a_k = decay + k * NV;
            float *dB_k = dB_lanes.data() + k * NV, *dC_k = dC_lanes.data() + k * NV;
            float* dA_block = dA_ptr + (b * G + g) * NV;
            vec du{}, ddt{};
            for (int64_t n = 0; n < N; ++n) {
              const int64_t i = n * V;
              const vec dh = load(carry + i) + dy * Ct[n];
              store(dC_k + i, load(dC_k + i) + dy * load(after + i));
              store(dB_k + i, load(dB_k + i) + dh * u);
              du += dh * Bt[n];
              const vec back = dh * load(a_k + i);
              store(carry + i, back);
              const vec dlog = back * load(before + i);  // the gradient of dt A
              ddt += dlog * load(A_block + i);
              store(dA_block + i, load(dA_block + i) + dlog * dt);
            }
            store(dx_ptr + place, du * dt + dy * D_block, lanes);
            store(dr_ptr + place, (ddt + du * inputs[k]) * slopes[k], lanes);
          }
          store(dD_ptr + b * G * V + first, load(dD_ptr + b * G * V + first) + dD_block);
        }
        for (int64_t k = 0; k < steps; ++k) {
          for (int64_t n = 0; n < N; ++n) {
            const int64_t place = ((range * batch + b) * L + from + k) * N + n;
            dB_ptr[place] = sum(load(dB_lanes.data() + k * NV + n * V));
            dC_ptr[place] = sum(load(dC_lanes.data() + k * NV + n * V));
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
  m.def("selective_forward", &forward);
  m.def("selective_backward", &backward);
}
