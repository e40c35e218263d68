// A block of the encoder: 8 hidden units, and of some datapoints mu, logvar and z.
#pragma once

#include "../../math/gaussian.h"
#include "../../math/philox.h"
#include "persistent_block.cuh"

namespace vae_fast {
namespace engine {
namespace persistent {

template <Precision kPrecision, UpdateKind kKind>
struct Encoder : Block<kPrecision, kKind> {
  using Base = Block<kPrecision, kKind>;
  using Base::fetch, Base::g, Base::in, Base::k_group, Base::kParts, Base::lane, Base::p, Base::row_group, Base::s,
      Base::strides, Base::t, Base::thread, Base::warp;

  const EncoderMemory& m;
  const int block, first_unit, columns;  // columns: of the heads, mu's and then logvar's

  __device__ __forceinline__ explicit Encoder(const Arguments& arguments)
      : Base(arguments),
        m(arguments.encoder),
        block(static_cast<int>(blockIdx.x)),
        first_unit(block * kUnits),
        columns(2 * arguments.sizes.latents) {}

  // The weights that a thread holds, 8 pair + 4 u + i: of unit 2 t + u, pixel(pair) + i
  __device__ __forceinline__ int pixel(int pair) const { return 32 * (warp + kWarps * pair) + 4 * g; }
  __device__ __forceinline__ int64_t index_of(int held) const {
    const int unit = first_unit + 2 * t + held / 4 % 2, at = pixel(held / 8) + held % 4;
    return unit < s.encoder_units && at < s.data_dim ? static_cast<int64_t>(unit) * s.data_dim + at : -1;
  }

  // The small parameters of this block; the biases of the heads are in every block, and the first gives them back.
  template <class Do>
  __device__ __forceinline__ void each_kept(const Do& with, bool of_all) {
    const Parameters& own = p.parameters;
    for (int i = thread; i < columns * kUnits; i += kThreads) {
      const int c = i / kUnits, unit = first_unit + i % kUnits;
      with(own.head_weight[c / s.latents],
           unit < s.encoder_units ? static_cast<int64_t>(c % s.latents) * s.encoder_units + unit : -1, m.heads, i);
    }
    for (int c = thread; of_all && c < columns; c += kThreads)
      with(own.head_bias[c / s.latents], c % s.latents, m.head_bias, c);
    if (thread < kUnits) {
      const int unit = first_unit + thread;
      with(own.encoder_bias, unit < s.encoder_units ? unit : -1, m.bias, thread);
    }
  }

  // As the forward product reads them: of 16 pixels, the fragments' k 2 t and 2 t + 1 are pixels 4 t and 4 t + 1, their
  // k 2 t + 8 and 2 t + 9 pixels 4 t + 2 and 4 t + 3, which a thread finds in one word of x.
  __device__ __forceinline__ void put_weights(const Held& held, int pair) {
    if (pixel(pair) >= s.row_bytes) return;
    const int place = pixel(pair) / 16 * 16 + g % 4 * 2;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float* own = held.w + 8 * pair + 4 * u + i;
        const typename Base::Halves two[2] = {this->split(kWeightScale * own[0]), this->split(kWeightScale * own[1])};
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          *reinterpret_cast<uint32_t*>(in(m.weight) + (part * kUnits + 2 * t + u) * strides.encoder + place + i * 4) =
              Base::pair_of(two, part);
      }
    }
  }

  __device__ __forceinline__ uint8_t* x_of(int64_t step) const {
    return in(m.x) + step % 2 * s.most_size * s.row_bytes;
  }

  __device__ __forceinline__ void fetch_x(int64_t step) const {
    if (thread != 0) return;
    const uint32_t bytes = static_cast<uint32_t>(s.most_size * s.row_bytes);
    expect_bytes(in(m.arrived) + step % 2, bytes);
    copy_bulk(x_of(step), p.exchanged.x + step * bytes, bytes, in(m.arrived) + step % 2);
  }

  __device__ __forceinline__ void begin(Held& held) {
    if (thread == 0) start_arrivals(in(m.arrived), 3);
    Base::fetch(p.parameters.encoder_weight, held, [&](int i) { return index_of(i); });
    each_kept([&](const Trained& from, int64_t at, const Kept& kept, int i) { this->fetch(from, at, kept, i); }, true);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) put_weights(held, pair);
    __syncthreads();
    fetch_x(0);
  }

  __device__ __forceinline__ void end(const Held& held) {
    if (!this->ends_well()) return;
    Base::give_back(p.parameters.encoder_weight, held, [&](int i) { return index_of(i); });
    each_kept([&](const Trained& to, int64_t at, const Kept& kept, int i) { this->give_back(to, at, kept, i); },
              block == 0);
  }

  // h, and the summands of the heads that its units have
  __device__ __forceinline__ void forward(const uint8_t* x, int size) {
    if (32 * row_group < s.rows) {
      const uint8_t* row[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 32 * row_group + 8 * i + g;  // what stands beyond the minibatch is not looked at again
        row[i] = x + (at < s.most_size ? at : s.most_size - 1) * s.row_bytes + 4 * t;
      }
      const uint16_t* weight = this->b_of_lane(in(m.weight), kUnits, strides.encoder);
      float c[2][1][4] = {};
#pragma unroll 2
      for (int k = 16 * k_group; k < s.row_bytes; k += 16 * kGroups) {
        uint32_t a[1][2][4], b[kParts][1][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t word = *reinterpret_cast<const uint32_t*>(row[i] + k);
          a[0][i / 2][i % 2] = halves_of_bytes(word, false);
          a[0][i / 2][i % 2 + 2] = halves_of_bytes(word, true);
        }
        this->load_b(b, 0, weight + k);
        this->multiply(c, a, b);
      }
      this->leave(in(m.sums), kUnitSumStride, c);
    }
    __syncthreads();
    const int row = thread / 4;
    if (row < s.rows) {
      const float2 products = this->two_sums(in(m.sums), kUnitSumStride, row, thread % 4 * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int u = thread % 4 * 2 + i;
        const float product = i == 0 ? products.x : products.y;
        const float a = Math<float>::fma(product, p.x_scale / kWeightScale, in(m.bias.place)[u]);
        in(m.h)[u * kColumn + row] = row < size && first_unit + u < s.encoder_units ? activate(p.activation, a) : 0.0f;
      }
    }
    __syncthreads();
    if (row >= size) return;
    float h[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) h[u] = in(m.h)[u * kColumn + row];
    float* parts = p.exchanged.head_parts + static_cast<int64_t>(row * s.encoder_blocks + block) * columns;
    for (int c = thread % 4; c < columns; c += 4) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kUnits; u += 4) {
        const float4 four = *reinterpret_cast<const float4*>(in(m.heads.place) + c * kUnits + u);
        sum = Math<float>::fma(h[u], four.x, sum);
        sum = Math<float>::fma(h[u + 1], four.y, sum);
        sum = Math<float>::fma(h[u + 2], four.z, sum);
        sum = Math<float>::fma(h[u + 3], four.w, sum);
      }
      parts[c] = sum;
    }
  }

  // The blocks' summands for a datapoint, [blocks, kColumns, latents], added up: with_sums(i, datapoint, j, sums) for
  // each datapoint of this block, its i-th, and each latent j, by a thread of its own. Two datapoints at a time.
  template <int kColumns, class WithSums>
  __device__ __forceinline__ void add_parts(const float* parts, int blocks, int latents, int size,
                                            const WithSums& with_sums) {
    constexpr int kTeam = kThreads / 2;
    const int n = kColumns * latents, local = thread % kTeam, teams = kTeam / n, own = local / n;
    float* partial = in(m.partial) + thread / kTeam * kTeam;
    for (int i = thread / kTeam; (i - thread / kTeam) * s.encoder_blocks + block < size; i += 2) {
      const int datapoint = block + i * s.encoder_blocks;
      __syncthreads();
      if (datapoint < size && own < teams) {
        const float* from = parts + static_cast<int64_t>(datapoint) * blocks * n + local % n;
        constexpr int kAhead = 6 * kColumns;  // loads under way at a time: all of them in the paper's model
        float sum = 0.0f;
        for (int first = own; first < blocks; first += kAhead * teams) {
          float loaded[kAhead];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const int part = first + i * teams;
            loaded[i] = read_through(from + (part < blocks ? part : first) * n);
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) sum += first + i * teams < blocks ? loaded[i] : 0.0f;
        }
        partial[local] = sum;
      }
      __syncthreads();
      if (datapoint < size && local < s.latents) {
        float sums[kColumns] = {};
        for (int team = 0; team < teams; ++team) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) sums[c] += partial[team * n + c * latents + local];
        }
        with_sums(i, datapoint, local, sums);
      }
    }
  }

  __device__ __forceinline__ float* latent(int i) const { return in(m.latents) + i * 4 * s.latents; }

  // By the last warps first: the first thread waits for the heads meanwhile.
  __device__ __forceinline__ void draw_noise(int64_t seed, int size) {
    for (int e = kThreads - 1 - thread; e / s.latents * s.encoder_blocks + block < size; e += kThreads) {
      const int i = e / s.latents, j = e % s.latents;
      const int64_t datapoint = block + i * s.encoder_blocks;
      latent(i)[2 * s.latents + j] = philox_normal(seed, datapoint * s.latents + j);
    }
  }

  __device__ __forceinline__ void draw_latents(int size) {
    add_parts<2>(p.exchanged.head_parts, s.encoder_blocks, s.latents, size,
                 [&](int i, int datapoint, int j, const float (&sums)[2]) {
                   float* own = latent(i);
                   const float mu = sums[0] + in(m.head_bias.place)[j];
                   const float logvar = Math<float>::fma(p.logvar_scale, sums[1], in(m.head_bias.place)[s.latents + j]);
                   const float z = reparameterize(mu, logvar, own[2 * s.latents + j]);
                   own[j] = mu;
                   own[s.latents + j] = logvar;
                   own[3 * s.latents + j] = z;
                   p.exchanged.z[datapoint * strides.latents + j] = z;
                 });
  }

  // After the signal that z is there: nobody waits for it.
  __device__ __forceinline__ void leave_kl(int64_t step, int size) {
    const int datapoint = block + thread * s.encoder_blocks;
    if (datapoint >= size) return;
    const float* own = latent(thread);
    float kl = 0.0f;
    for (int j = 0; j < s.latents; ++j) {
      const float mu = own[j], logvar = own[s.latents + j], e = own[2 * s.latents + j], z = own[3 * s.latents + j];
      kl += p.estimator == Estimator::sgvb_b ? gaussian_kl(mu, logvar) : sampled_kl(logvar, e, z);
    }
    p.exchanged.kl_parts[step * s.most_size + datapoint] = kl;
  }

  __device__ __forceinline__ void derive_latents(int size) {
    add_parts<1>(p.exchanged.z_parts, s.hidden_blocks, strides.latents, size,
                 [&](int i, int datapoint, int j, const float (&sums)[1]) {
                   const float* own = latent(i);
                   const float mu = own[j], logvar = own[s.latents + j], e = own[2 * s.latents + j];
                   const bool sgvb_a = p.estimator == Estimator::sgvb_a;
                   const float in_z = sgvb_a ? sums[0] - p.beta * own[3 * s.latents + j] : sums[0];
                   const LatentGradient gradient(p.estimator, p.beta, p.logvar_scale, mu, logvar, in_z, in_z * e, true);
                   float* to = p.exchanged.head_grads + j * kColumn + datapoint;
                   to[0] = gradient.mu;
                   to[s.latents * kColumn] = gradient.logvar;
                 });
  }

  // The gradient in own units' pre-activations, from that in the heads
  __device__ __forceinline__ void backward(int64_t step, int size) {
    Arrival* arrived = in(m.arrived) + 2;
    if (thread == 0) {
      const uint32_t bytes = static_cast<uint32_t>(columns * kColumn) * sizeof(float);
      expect_bytes(arrived, bytes);
      copy_bulk(in(m.head_grads), p.exchanged.head_grads, bytes, arrived);
    }
    wait_for_bytes(arrived, step % 2);
    const int row = thread / 4, first = thread % 4 * 2;
    if (row < s.rows) {
      const float* grads = in(m.head_grads) + row;  // beyond the minibatch what was there before
      const float* weight = in(m.heads.place) + first;
      float sums[2] = {};
#pragma unroll 4
      for (int c = 0; c < columns; ++c) {
        const float grad = grads[c * kColumn];
        const float2 two = *reinterpret_cast<const float2*>(weight + c * kUnits);
        sums[0] = Math<float>::fma(grad, two.x, sums[0]);
        sums[1] = Math<float>::fma(grad, two.y, sums[1]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int u = first + i, at = u * kColumn + row;
        // Elsewhere h is 0, which for softplus is no activation.
        const bool there = row < size && first_unit + u < s.encoder_units;
        in(m.grad)[at] = there ? through_activation(p.activation, sums[i], in(m.h)[at]) : 0.0f;
        const auto halves = this->split(kUnitScale * in(m.grad)[at]);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          in(m.grad_halves)[(part * kUnits + u) * kHalfColumn + row] = halves.part[part];
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void update_weights(Held& held, const uint8_t* x, int size, const StepFactors& factors) {
    const float scale = -1.0f / static_cast<float>(size), product_scale = scale * p.x_scale / kUnitScale;
    const uint16_t* grads = this->b_of_lane(in(m.grad_halves), kUnits, kHalfColumn);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (pixel(pair) - 4 * g >= s.data_dim) break;
      const uint8_t* of_pixels = x + (pixel(pair) < s.row_bytes ? pixel(pair) : 0);  // those beyond are not kept
      const int last = (s.most_size - 1) * s.row_bytes;  // beyond the minibatch the gradient is 0
      int row_at = 2 * t * s.row_bytes;
      float c[2][1][4] = {};
#pragma unroll 1
      for (int k = 0; k < s.rows; k += 16, row_at += 16 * s.row_bytes) {
        uint32_t words[4], a[1][2][4], b[kParts][1][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = row_at + (i / 2 * 8 + i % 2) * s.row_bytes;
          words[i] = *reinterpret_cast<const uint32_t*>(of_pixels + (at < last ? at : last));
        }
#pragma unroll
        for (int fragment = 0; fragment < 2; ++fragment) {  // pixels 4 g and 4 g + 1; 4 g + 2 and 4 g + 3
          const uint32_t order = fragment == 0 ? 0x5140 : 0x7362;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t pairs = __byte_perm(words[2 * half], words[2 * half + 1], order);
            a[0][fragment][2 * half] = halves_of_bytes(pairs, false);
            a[0][fragment][2 * half + 1] = halves_of_bytes(pairs, true);
          }
        }
        this->load_b(b, 0, grads + k);
        this->multiply(c, a, b);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first_unit + 2 * t + u >= s.encoder_units || pixel(pair) + i >= s.data_dim) continue;
          this->step(factors, product_scale * c[i / 2][0][i % 2 * 2 + u], held, 8 * pair + 4 * u + i);
        }
      }
      put_weights(held, pair);
    }
    // Threads of the last warps first, whose share of the weights is smaller
    const int weights = columns * kUnits;
    for (int i = kThreads - 1 - thread; i < weights + columns + kUnits; i += kThreads) {
      if (i < weights) {
        const float sum = this->dot(in(m.head_grads) + i / kUnits * kColumn, in(m.h) + i % kUnits * kColumn);
        if (first_unit + i % kUnits >= s.encoder_units) continue;
        this->step(factors, Math<float>::fma(p.weight_prior, in(m.heads.place)[i], scale * sum), m.heads, i);
      } else if (i < weights + columns) {
        const int c = i - weights;
        const float sum = this->total(in(m.head_grads) + c * kColumn, size);
        this->step(factors, scale * (c < s.latents ? sum : sum / p.logvar_scale), m.head_bias, c);
      } else if (first_unit + i - weights - columns < s.encoder_units) {
        const int u = i - weights - columns;
        this->step(factors, scale * this->total(in(m.grad) + u * kColumn, size), m.bias, u);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    Held held;
    begin(held);
    this->start_clock(m.cycles);
    for (int64_t step = 0; step < p.steps; ++step) {
      const int size = static_cast<int>(p.size[step]);
      const int64_t seed = p.seeds[2 * step];
      const uint8_t* x = x_of(step);
      if (step + 1 < p.steps) fetch_x(step + 1);
      wait_for_bytes(in(m.arrived) + step % 2, step / 2 % 2);
      this->end_of(0, m.cycles);
      forward(x, size);
      this->signal(kHeads);
      this->end_of(1, m.cycles);
      draw_noise(seed, size);
      const StepFactors factors = p.factors[step];
      this->end_of(2, m.cycles);
      this->wait(kHeads, step, s.encoder_blocks);
      this->end_of(3, m.cycles);
      draw_latents(size);
      order_global_before_copies();
      this->signal(kZ);
      this->end_of(4, m.cycles);
      leave_kl(step, size);
      order_shared_before_copies();  // the sums have been where the gradient in the heads is copied to
      this->end_of(5, m.cycles);
      this->wait(kLatents, step, s.decoder_blocks);
      this->end_of(6, m.cycles);
      derive_latents(size);
      order_global_before_copies();
      this->signal(kDone);
      this->end_of(7, m.cycles);
      this->wait(kDone, step, s.encoder_blocks);
      this->end_of(8, m.cycles);
      backward(step, size);
      this->end_of(9, m.cycles);
      update_weights(held, x, size, factors);
      this->end_of(10, m.cycles);
    }
    this->leave_cycles(m.cycles);
    end(held);
  }
};

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
