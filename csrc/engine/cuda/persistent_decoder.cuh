// A block of the decoder: 8 hidden units, and 16 pixels.
#pragma once

#include "../../math/bernoulli.h"
#include "persistent_block.cuh"

namespace vae_fast {
namespace engine {
namespace persistent {

template <Precision kPrecision, UpdateKind kKind>
struct Decoder : Block<kPrecision, kKind> {
  using Base = Block<kPrecision, kKind>;
  using Base::fetch, Base::g, Base::in, Base::k_group, Base::kChunkHalves, Base::kParts, Base::lane, Base::p,
      Base::row_group, Base::s, Base::strides, Base::t, Base::thread, Base::warp;

  const DecoderMemory& m;
  const int block, first_unit, first_out;
  uint32_t chunks_taken = 0;  // of the ring, by all streams so far

  __device__ __forceinline__ explicit Decoder(const Arguments& arguments)
      : Base(arguments),
        m(arguments.decoder),
        block(static_cast<int>(blockIdx.x) - arguments.sizes.encoder_blocks),
        first_unit(block * kUnits),
        first_out(block * kOuts) {}

  __device__ __forceinline__ bool has_hidden() const { return block < s.hidden_blocks; }
  __device__ __forceinline__ bool has_outputs() const { return block < s.output_blocks; }

  // The weights that a thread holds, 4 turn + i: weight i of the warp's fragment of chunk 2 turn + warp / 8
  struct Weight {
    int unit, out;  // of this block's pixels
  };
  __device__ __forceinline__ Weight place(int held) const {
    const int fragment = warp % 8, chunk = held / 4 * 2 + warp / 8;
    return {kChunk * chunk + fragment % 4 * 16 + g + held % 4 / 2 * 8, fragment / 4 * 8 + 2 * t + held % 2};
  }
  __device__ __forceinline__ int64_t index_of(int held) const {
    const Weight at = place(held);
    const bool there = at.unit < s.decoder_units && first_out + at.out < s.data_dim;
    return there ? static_cast<int64_t>(first_out + at.out) * s.decoder_units + at.unit : -1;
  }

  template <class Do>
  __device__ __forceinline__ void each_kept(const Do& with) {
    const Parameters& own = p.parameters;
    for (int i = thread; i < kUnits * strides.latents; i += kThreads) {
      const int unit = first_unit + i / strides.latents, j = i % strides.latents;
      const bool there = unit < s.decoder_units && j < s.latents;
      with(own.decoder_weight, there ? static_cast<int64_t>(unit) * s.latents + j : -1, m.hidden, i);
    }
    if (thread < kUnits) {
      const int unit = first_unit + thread;
      with(own.decoder_bias, unit < s.decoder_units ? unit : -1, m.bias, thread);
    }
    if (thread < kOuts) {
      const int out = first_out + thread;
      with(own.output_bias, out < s.data_dim ? out : -1, m.output_bias, thread);
    }
  }

  // To this block's rows of the output's weight, and to the columns that the units' blocks have of it
  __device__ __forceinline__ void put_weights(const Held& held, int turn) {
    if (!has_outputs()) return;
#pragma unroll
    for (int i = 4 * turn; i < 4 * turn + 4; i += 2) {
      const Weight at = place(i);
      if (at.unit >= strides.hidden_chunks * kChunk) continue;
      const typename Base::Halves two[2] = {this->split(kWeightScale * held.w[i]),
                                            this->split(kWeightScale * held.w[i + 1])};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint16_t* row = in(m.weight) + (part * kOuts + at.out) * strides.output + at.unit;
        row[0] = two[0].part[part];
        row[strides.output] = two[1].part[part];
        if (at.unit >= s.hidden_blocks * kUnits) continue;
        const int owner = at.unit / kUnits;
        uint16_t* column =
            p.exchanged.columns +
            static_cast<int64_t>((owner * kParts + part) * kUnits + at.unit % kUnits) * strides.own_columns +
            first_out + at.out;
        *reinterpret_cast<uint32_t*>(column) = Base::pair_of(two, part);
      }
    }
  }

  __device__ __forceinline__ void begin(Held& held) {
    if (thread == 0) start_arrivals(in(m.arrived), kStages + 2);
    Base::fetch(p.parameters.output_weight, held, [&](int i) { return index_of(i); });
    each_kept([&](const Trained& from, int64_t at, const Kept& kept, int i) { this->fetch(from, at, kept, i); });
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) put_weights(held, turn);
    __syncthreads();
  }

  __device__ __forceinline__ void end(const Held& held) {
    if (!this->ends_well()) return;
    Base::give_back(p.parameters.output_weight, held, [&](int i) { return index_of(i); });
    each_kept([&](const Trained& to, int64_t at, const Kept& kept, int i) { this->give_back(to, at, kept, i); });
  }

  // Chunks come through the ring, one after another. All threads call these together: `open` when none looks at the
  // ring any more, then for every chunk `taken`, which says where it lies, and for every one or more of them `release`.
  // `rows` of a chunk are copied; what is in the others is old.
  __device__ __forceinline__ void open(const uint16_t* from, int rows, int chunks) const {
    if (thread != 0) return;
    for (int chunk = 0; chunk < kStages && chunk < chunks; ++chunk) fetch(from, rows, chunk);
  }
  __device__ __forceinline__ const uint16_t* taken(int chunk) const {
    const uint32_t number = chunks_taken + static_cast<uint32_t>(chunk), stage = number % kStages;
    wait_for_bytes(in(m.arrived) + stage, number / kStages % 2);
    return in(m.ring) + stage * kChunkHalves;
  }
  __device__ __forceinline__ void release(const uint16_t* from, int rows, int chunk, int count, int chunks) const {
    __syncthreads();
    if (thread != 0) return;
    for (int next = chunk + kStages; next < chunk + kStages + count && next < chunks; ++next) fetch(from, rows, next);
  }
  __device__ __forceinline__ void fetch(const uint16_t* from, int rows, int chunk) const {
    const uint32_t stage = (chunks_taken + static_cast<uint32_t>(chunk)) % kStages;
    const uint32_t bytes = static_cast<uint32_t>(rows * kChunk) * sizeof(uint16_t);
    expect_bytes(in(m.arrived) + stage, kParts * bytes);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {  // of the room for rows what is used
      const int at = part * kMostRows * kChunk;
      copy_bulk(in(m.ring) + stage * kChunkHalves + at, from + static_cast<int64_t>(chunk) * kChunkHalves + at, bytes,
                in(m.arrived) + stage);
    }
  }

  template <class With>
  __device__ __forceinline__ void stream(const uint16_t* from, int rows, int chunks, const With& with) {
    open(from, rows, chunks);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      with(chunk, taken(chunk));
      release(from, rows, chunk, 1, chunks);
    }
    chunks_taken += static_cast<uint32_t>(chunks);
  }

  // What a chunk adds to a warp's part of [rows, 8 N]: `a` is where the lane reads of a chunk, `b` where of B
  template <int N>
  __device__ __forceinline__ static void add_chunk(float (&c)[2][N][4], const uint16_t* a_of_lane,
                                                   const uint16_t* b_of_lane, int b_stride) {
    uint32_t a[kParts][2][4], b[kParts][N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) Base::load_b(b, n, b_of_lane + 8 * n * b_stride);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) load_fragments(a[part][i], a_of_lane + (part * kMostRows + 16 * i) * kChunk);
    }
    Base::multiply(c, a, b);
  }
  // Of 32 rows of a chunk, the 16 columns of the warp's k group
  __device__ __forceinline__ int a_of_lane() const {
    const int row = 32 * row_group + lane % 16;
    return row * kChunk + piece_of(row, 2 * k_group + lane / 16) * 8;
  }

  __device__ __forceinline__ const uint16_t* hidden_of(int64_t step) const {
    return p.exchanged.hidden + step % 2 * strides.hidden_chunks * kChunkHalves;
  }

  // h' of own units, for all blocks
  __device__ __forceinline__ void forward(int64_t step, int size) {
    if (!has_hidden()) return;
    Arrival* arrived = in(m.arrived) + kStages + 1;
    if (thread == 0) {
      const uint32_t bytes = static_cast<uint32_t>(size * strides.latents) * sizeof(float);
      expect_bytes(arrived, bytes);
      copy_bulk(in(m.z), p.exchanged.z, bytes, arrived);
    }
    wait_for_bytes(arrived, step % 2);
    const int row = thread / 4, first = thread % 4 * 2;
    if (row >= s.rows) return;
    float h[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int u = first + i;
      h[i] = 0.0f;
      if (row < size && first_unit + u < s.decoder_units) {
        h[i] = activate(p.activation, this->add_dot(in(m.bias.place)[u], in(m.z) + row * strides.latents,
                                                    in(m.hidden.place) + u * strides.latents, strides.latents));
      }
      in(m.h)[u * kColumn + row] = h[i];
    }
    const typename Base::Halves two[2] = {this->split(kHiddenScale * h[0]), this->split(kHiddenScale * h[1])};
    uint16_t* chunk = const_cast<uint16_t*>(hidden_of(step)) + static_cast<int64_t>(first_unit / kChunk) * kChunkHalves;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint16_t* to = chunk + (part * kMostRows + row) * kChunk + piece_of(row, block % 8) * 8 + first;
      *reinterpret_cast<uint32_t*>(to) = Base::pair_of(two, part);
    }
  }

  // While others finish theirs, and by the last warps first
  __device__ __forceinline__ void fetch_x(int64_t step, int size) {
    const int row = kThreads - 1 - thread;
    if (!has_outputs() || row >= size) return;
    const uint8_t* from = p.exchanged.x + (step * s.most_size + row) * s.row_bytes + first_out;
    *reinterpret_cast<uint4*>(in(m.x) + row * kOuts) = *reinterpret_cast<const uint4*>(from);
  }

  // Own units' columns of the output's weights, which all blocks have updated before they signalled their h'.
  __device__ __forceinline__ void fetch_columns() {
    if (!has_hidden() || thread != 0) return;
    const uint32_t halves = static_cast<uint32_t>(kParts * kUnits * strides.own_columns),
                   bytes = halves * sizeof(uint16_t);
    expect_bytes(in(m.arrived) + kStages, bytes);
    copy_bulk(in(m.columns), p.exchanged.columns + static_cast<int64_t>(block) * halves, bytes,
              in(m.arrived) + kStages);
  }

  // The logits of own pixels, log p(x|z) and its gradient in them
  __device__ __forceinline__ void output(int64_t step, int size) {
    if (!has_outputs()) return;
    float c[2][2][4] = {};
    const int a = a_of_lane();
    const uint16_t* b = this->b_of_lane(in(m.weight), kOuts, strides.output) + 16 * k_group;
    stream(hidden_of(step), size, strides.hidden_chunks, [&](int, const uint16_t* at) {
      add_chunk(c, at + a, b, strides.output);
      b += kChunk;
    });
    this->leave(in(m.sums), kOutSumStride, c);
    __syncthreads();
    const int row = thread / 4, first = thread % 4 * 4, out = first_out + first;
    BernoulliSum<float> sum;
    if (row < s.rows) {
      typename Base::Halves grads[4];
      float products[4];
      this->four_sums(in(m.sums), kOutSumStride, row, first, products);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float grad = 0.0f;
        if (row < size && out + i < s.data_dim) {
          const float logit =
              Math<float>::fma(products[i], 1.0f / (kHiddenScale * kWeightScale), in(m.output_bias.place)[first + i]);
          const float target = p.x_scale * static_cast<float>(in(m.x)[row * kOuts + first + i]);
          const float odds = bernoulli_odds(logit);
          sum.add(logit, target, odds);
          grad = bernoulli_grad_logit(logit, target, odds);
        }
        grads[i] = this->split(kLogitScale * grad);
      }
      const int chunk = out / kChunk, piece = piece_of(row, out / 8 % 8);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint2 four;
        four.x = grads[0].part[part] | static_cast<uint32_t>(grads[1].part[part]) << 16;
        four.y = grads[2].part[part] | static_cast<uint32_t>(grads[3].part[part]) << 16;
        uint16_t* to = p.exchanged.grad + static_cast<int64_t>(chunk) * kChunkHalves +
                       (part * kMostRows + row) * kChunk + piece * 8 + out % 8;
        *reinterpret_cast<uint2*>(to) = four;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          in(m.logit_grads)[(part * kOuts + first + i) * kHalfColumn + row] = grads[i].part[part];
      }
    }
    in(m.log_likelihoods)[thread] = sum.log_likelihood();
  }

  // By one warp, when nobody waits for it
  __device__ __forceinline__ void leave_log_likelihood(int64_t step) const {
    if (!has_outputs() || warp != kWarps - 1) return;
    double sum = 0.0;
    for (int i = lane; i < kThreads; i += kWarp) sum += in(m.log_likelihoods)[i];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) p.exchanged.ll_parts[step * s.output_blocks + block] = sum;
  }

  // The gradient in own units' pre-activations, and their summands of the gradient in z
  __device__ __forceinline__ void backward(int size) {
    if (!has_hidden()) return;
    float c[2][1][4] = {};
    const int a = a_of_lane();
    const uint16_t* b = this->b_of_lane(in(m.columns), kUnits, strides.own_columns) + 16 * k_group;
    stream(p.exchanged.grad, size, strides.data_chunks, [&](int chunk, const uint16_t* at) {
      if (4 * chunk + k_group < s.output_blocks) add_chunk(c, at + a, b, 0);
      b += kChunk;
    });
    this->leave(in(m.sums), kUnitSumStride, c);
    __syncthreads();
    const int row = thread / 4;
    if (row < s.rows) {
      const float2 sums = this->two_sums(in(m.sums), kUnitSumStride, row, thread % 4 * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int u = thread % 4 * 2 + i, at = u * kColumn + row;
        const float grad = (i == 0 ? sums.x : sums.y) / (kLogitScale * kWeightScale);
        const bool there = row < size && first_unit + u < s.decoder_units;
        in(m.grad)[at] = there ? through_activation(p.activation, grad, in(m.h)[at]) : 0.0f;
      }
    }
    __syncthreads();
    if (row >= size) return;
    float grad[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) grad[u] = in(m.grad)[u * kColumn + row];
    float* parts = p.exchanged.z_parts + static_cast<int64_t>(row * s.hidden_blocks + block) * strides.latents;
    for (int j = thread % 4 * 4; j < s.latents; j += 16) {
      float4 sums = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float4 four = *reinterpret_cast<const float4*>(in(m.hidden.place) + u * strides.latents + j);
        sums.x = Math<float>::fma(grad[u], four.x, sums.x);
        sums.y = Math<float>::fma(grad[u], four.y, sums.y);
        sums.z = Math<float>::fma(grad[u], four.z, sums.z);
        sums.w = Math<float>::fma(grad[u], four.w, sums.w);
      }
      *reinterpret_cast<float4*>(parts + j) = sums;
    }
  }

  __device__ __forceinline__ void update_hidden(int size, const StepFactors& factors) {
    if (!has_hidden()) return;
    const float scale = -1.0f / static_cast<float>(size);
    const int weights = kUnits * strides.latents;
    for (int i = thread; i < weights + kUnits; i += kThreads) {
      const bool weight = i < weights;
      const int u = weight ? i / strides.latents : i - weights, j = i % strides.latents;
      if (first_unit + u >= s.decoder_units || (weight && j >= s.latents)) continue;
      const float* grad = in(m.grad) + u * kColumn;
      if (!weight) {
        this->step(factors, scale * this->total(grad, size), m.bias, u);
        continue;
      }
      float sum = 0.0f;
      for (int row = 0; row < size; ++row) sum = Math<float>::fma(grad[row], in(m.z)[row * strides.latents + j], sum);
      this->step(factors, Math<float>::fma(p.weight_prior, in(m.hidden.place)[i], scale * sum), m.hidden, i);
    }
  }

  __device__ __forceinline__ void update_output(Held& held, int64_t step, int size, const StepFactors& factors) {
    if (!has_outputs()) return;
    const float scale = -1.0f / static_cast<float>(size), product_scale = scale / (kLogitScale * kHiddenScale);
    const int fragment = warp % 8;
    // Of a chunk, 16 rows of the fragment's 16 units; 16 rows further on pieces lie as they do here.
    const int row = lane / 16 * 8 + lane % 8, a_at = row * kChunk + piece_of(row, fragment % 4 * 2 + lane / 8 % 2) * 8;
    const uint16_t* b_at = this->b_of_lane(in(m.logit_grads), kOuts, kHalfColumn) + fragment / 4 * 8 * kHalfColumn;
    const uint16_t* from = hidden_of(step);
    const int chunks = strides.hidden_chunks;
    open(from, s.rows, chunks);  // here rows are what is summed over: those beyond the minibatch are 0
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {  // two chunks; half of the warps take the one, half the other
      const int first = 2 * turn, own = first + warp / 8;
      if (first >= chunks) break;
      float c[1][1][4] = {};
      if (own < chunks) {
        const uint16_t* at = taken(own) + a_at;
#pragma unroll 1
        for (int k = 0; k < s.rows; k += 16) {
          uint32_t a[kParts][1][4], b[kParts][1][2];
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            load_transposed_fragments(a[part][0], at + (part * kMostRows + k) * kChunk);
          this->load_b(b, 0, b_at + k);
          this->multiply(c, a, b);
        }
      }
      release(from, s.rows, first, 2, chunks);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Weight at = place(4 * turn + i);
        if (at.unit >= s.decoder_units || first_out + at.out >= s.data_dim) continue;
        this->step(factors, product_scale * c[0][0][i], held, 4 * turn + i);
      }
      put_weights(held, turn);
    }
    chunks_taken += static_cast<uint32_t>(chunks);
    if (warp < kOuts && first_out + warp < s.data_dim) {
      const uint16_t* grads = in(m.logit_grads) + warp * kHalfColumn;
      float sum = 0.0f;
      for (int row = lane; row < s.rows; row += kWarp) {
        sum += half_value(grads[row]);
        if constexpr (kParts == 2) sum += half_value(grads[kOuts * kHalfColumn + row]);
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == 0) this->step(factors, scale / kLogitScale * sum, m.output_bias, warp);
    }
  }

  __device__ __forceinline__ void run() {
    Held held;
    begin(held);
    this->start_clock(m.cycles);
    for (int64_t step = 0; step < p.steps; ++step) {
      const int size = static_cast<int>(p.size[step]);
      this->wait(kZ, step, s.encoder_blocks);
      this->end_of(0, m.cycles);
      forward(step, size);
      order_global_before_copies();  // of h', and of the columns that the update before has written
      this->signal(kHidden);
      this->end_of(1, m.cycles);
      fetch_x(step, size);
      this->end_of(2, m.cycles);
      this->wait(kHidden, step, s.decoder_blocks);
      fetch_columns();
      this->end_of(3, m.cycles);
      output(step, size);
      if (has_hidden()) wait_for_bytes(in(m.arrived) + kStages, step % 2);  // before others write there again
      order_global_before_copies();
      order_shared_before_copies();  // the sums have been where chunks are copied to
      this->signal(kLogits);
      this->end_of(4, m.cycles);
      this->wait(kLogits, step, s.decoder_blocks);
      this->end_of(5, m.cycles);
      leave_log_likelihood(step);
      backward(size);
      order_shared_before_copies();
      this->signal(kLatents);
      this->end_of(6, m.cycles);
      const StepFactors factors = p.factors[step];
      update_hidden(size, factors);
      this->end_of(7, m.cycles);
      update_output(held, step, size, factors);
      __syncthreads();
      this->end_of(8, m.cycles);
    }
    this->leave_cycles(m.cycles);
    end(held);
  }
};

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
