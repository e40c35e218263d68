// The kernel of persistent.h. Its blocks are all on the GPU at once (a cooperative launch), and wait for each other at
// events: counters that every block concerned adds one to, once a step. Buffers need no second copy where whoever
// writes them next has waited, through a chain of events, for those who read them; h' alone, which the decoder's update
// reads while the encoder goes on, has two.
#include <algorithm>

#include "../../math/bernoulli.h"
#include "../../math/gaussian.h"
#include "../../math/philox.h"
#include "../../math/splitmix.h"
#include "elements.cuh"
#include "on_chip.cuh"
#include "persistent.h"
#include "product.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#pragma nv_diag_suppress 177  // the kernel is empty there, and what it is made of is not used
#endif

namespace vae_fast {
namespace engine {
namespace persistent {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kUnits = 8, kOuts = 16;    // of a block
constexpr int kChunk = 64;               // columns of what bulk copies take
constexpr int kStages = 4;               // chunks under way
constexpr int kGroups = 4;               // of warps: so many share the rows, and so many the k
constexpr int kMostRows = 32 * kGroups;  // two fragments a warp; where rows lie in memory there is room for so many
// A column of a transposed matrix, floats or halves. Where fragments are read, what lies below each other is an odd
// number of 16 bytes apart, so in different banks.
constexpr int kColumn = kMostRows + 4, kHalfColumn = kMostRows + 8;
constexpr int kMostLatents = 64;
constexpr int kPairs = 2;  // of fragments of the encoder's weights that a warp keeps: of 32 pixels
constexpr int kTurns = 4;  // fragments of the output's weights that a warp keeps: one of every second chunk
constexpr int kMostRowBytes = 32 * kWarps * kPairs, kMostUnits = 2 * kTurns * kChunk;
constexpr int kBytesPerLine = 128;

// Powers of two that bring operands well into the range of a half
constexpr float kWeightScale = 256, kHiddenScale = 64, kLogitScale = 1024, kUnitScale = 16;

enum Event { kHeads, kZ, kHidden, kLogits, kLatents, kDone, kEnd, kOutOfRange, kEvents };

constexpr int halves_of_chunk(int parts) { return parts * kMostRows * kChunk; }
constexpr int ceil_of(int a, int b) { return (a + b - 1) / b; }

// The piece of 16 bytes of a row of 128 that has columns 8 piece to 8 piece + 7 of a chunk: so that rows below each
// other are read from different banks.
__device__ __forceinline__ int piece_of(int row, int piece) { return piece ^ (row & 7); }

// Weights that a thread keeps in registers with their states: 16 of them, whichever block it is in.
struct Held {
  float w[16], s0[16], s1[16];
};
static_assert(kPairs * 8 == 16 && kTurns * 4 == 16);

// Where something lies in shared memory: counted in bytes on the host, so that a kernel finds it in its arguments.
template <class T>
struct Place {
  int offset;
};

// Small parameters with their states, [3, count]
struct Kept {
  Place<float> place;
  int count;
};

class Room {
 public:
  template <class T>
  Place<T> take(int count) {
    const Place<T> taken{used_};
    used_ += ceil_of(count * static_cast<int>(sizeof(T)), kBytesPerLine) * kBytesPerLine;
    return taken;
  }
  Kept take_kept(int count) { return {take<float>(3 * count), count}; }
  int used() const { return used_; }

 private:
  int used_ = 0;
};

// Lengths that follow from the sizes
struct Strides {
  int latents;                       // floats of a row of z
  int hidden_chunks, data_chunks;    // of h', of the gradient in the logits
  int encoder, output, own_columns;  // halves of a row of weights, kept apart as columns are
  explicit Strides(const Sizes& s)
      : latents(ceil_of(s.latents, 4) * 4),
        hidden_chunks(ceil_of(s.decoder_units, kChunk)),
        data_chunks(ceil_of(s.data_dim, kChunk)),
        encoder(s.row_bytes + 8),
        output(hidden_chunks * kChunk + 8),
        own_columns(data_chunks * kChunk + 8) {}
};

// Of the sums of the k groups: rows below each other, so that pairs are written to different banks, or fours read so
constexpr int kUnitSumStride = kUnits, kOutSumStride = kOuts;

struct EncoderMemory {
  Place<Arrival> arrived;       // [3]: of x, of head_grads
  Place<uint8_t> x;             // [2, most_size, row_bytes]
  Place<uint16_t> weight;       // [parts, kUnits, encoder], the pixels of 16 in the order of fragments
  Place<float> sums;            // [kGroups, kMostRows, kUnitSumStride]
  Place<float> head_grads;      // [2 Z, kColumn], in the same place
  Place<float> h, grad;         // [kUnits, kColumn]
  Place<uint16_t> grad_halves;  // [parts, kUnits, kHalfColumn]
  Kept heads, head_bias;        // [2 Z, kUnits], [2 Z]
  Kept bias;                    // [kUnits]
  Place<float> partial;         // [kThreads]
  Place<float> latents;         // [own datapoints, 4, Z]: mu, logvar, eps, z
  Place<int64_t> cycles;        // [kPhases]
  int bytes;

  EncoderMemory(const Sizes& s, int parts) {
    const Strides strides(s);
    Room room;
    arrived = room.take<Arrival>(3);
    x = room.take<uint8_t>(2 * s.most_size * s.row_bytes);
    weight = room.take<uint16_t>(parts * kUnits * strides.encoder);
    sums = room.take<float>(std::max(kGroups * kMostRows * kUnitSumStride, 2 * s.latents * kColumn));
    head_grads = sums;
    h = room.take<float>(kUnits * kColumn);
    grad = room.take<float>(kUnits * kColumn);
    grad_halves = room.take<uint16_t>(parts * kUnits * kHalfColumn);
    heads = room.take_kept(2 * s.latents * kUnits);
    head_bias = room.take_kept(2 * s.latents);
    bias = room.take_kept(kUnits);
    partial = room.take<float>(kThreads);
    latents = room.take<float>(ceil_of(s.most_size, s.encoder_blocks) * 4 * s.latents);
    cycles = room.take<int64_t>(kPhases);
    bytes = room.used();
  }
};

struct DecoderMemory {
  Place<Arrival> arrived;        // [kStages + 2]: of the ring, of columns, of z
  Place<uint16_t> ring;          // [kStages, chunk]
  Place<float> sums;             // [kGroups, kMostRows, kOutSumStride or kUnitSumStride], in the same place
  Place<uint16_t> weight;        // [parts, kOuts, output]: own pixels'
  Place<uint16_t> columns;       // [parts, kUnits, own_columns]: own units'
  Place<float> z;                // [most_size, latents]
  Place<float> h, grad;          // [kUnits, kColumn]
  Place<uint16_t> logit_grads;   // [parts, kOuts, kHalfColumn]
  Place<uint8_t> x;              // [rows, kOuts]
  Place<float> log_likelihoods;  // [kThreads]
  Kept hidden, bias;             // [kUnits, latents], [kUnits]
  Kept output_bias;              // [kOuts]
  Place<int64_t> cycles;         // [kPhases]
  int bytes;

  DecoderMemory(const Sizes& s, int parts) {
    const Strides strides(s);
    Room room;
    arrived = room.take<Arrival>(kStages + 2);
    ring = room.take<uint16_t>(kStages * halves_of_chunk(parts));
    sums = {ring.offset};
    weight = room.take<uint16_t>(parts * kOuts * strides.output);
    columns = room.take<uint16_t>(parts * kUnits * strides.own_columns);
    z = room.take<float>(s.most_size * strides.latents);
    h = room.take<float>(kUnits * kColumn);
    grad = room.take<float>(kUnits * kColumn);
    logit_grads = room.take<uint16_t>(parts * kOuts * kHalfColumn);
    x = room.take<uint8_t>(s.rows * kOuts);
    log_likelihoods = room.take<float>(kThreads);
    hidden = room.take_kept(kUnits * strides.latents);
    bias = room.take_kept(kUnits);
    output_bias = room.take_kept(kOuts);
    cycles = room.take<int64_t>(kPhases);
    bytes = room.used();
  }
};
static_assert(kStages * kChunk * sizeof(uint16_t) >= kGroups * kOutSumStride * sizeof(float));

// What the kernel takes
struct Arguments : Launch {
  Strides strides;
  EncoderMemory encoder;
  DecoderMemory decoder;
  Arguments(const Launch& launch, int parts)
      : Launch(launch), strides(sizes), encoder(sizes, parts), decoder(sizes, parts) {}
};

// --- what both kinds of block do -------------------------------------------------------------------------------------

template <Precision kPrecision, UpdateKind kKind>
struct Block {
  static constexpr int kParts = kPrecision == Precision::exact ? 2 : 1;
  static constexpr int kChunkHalves = halves_of_chunk(kParts);
  static constexpr int kStates = kKind == UpdateKind::adam ? 2 : kKind == UpdateKind::sgd ? 0 : 1;
  const Arguments& p;
  const Sizes& s;
  const Strides& strides;
  char* const memory;
  int thread, warp, lane, g, t;  // g and t as in tensor_core.cuh
  int row_group, k_group;        // of the warp
  bool out_of_range = false;
  int64_t last_look = 0;  // at the clock

  __device__ __forceinline__ explicit Block(const Arguments& arguments)
      : p(arguments),
        s(arguments.sizes),
        strides(arguments.strides),
        memory(reinterpret_cast<char*>(dynamic_shared())) {
    look_again();
  }

  // A phase of a step has ended. Its time is counted; and addresses that follow from the thread's place are made anew,
  // rather than kept over all phases in registers that there are not.
  __device__ __forceinline__ void end_of(int phase, const Place<int64_t>& spent) {
    look_again();
    if (!p.timed || thread != 0) return;
    const int64_t now = cycles();
    in(spent)[phase] += now - last_look;
    last_look = now;
  }
  __device__ __forceinline__ void start_clock(const Place<int64_t>& spent) {
    for (int phase = 0; thread == 0 && phase < kPhases; ++phase) in(spent)[phase] = 0;
    if (p.timed) last_look = cycles();
  }
  __device__ __forceinline__ void leave_cycles(const Place<int64_t>& spent) const {
    int64_t* to = p.exchanged.cycles + static_cast<int64_t>(blockIdx.x) * kPhases;
    for (int phase = 0; p.timed && thread == 0 && phase < kPhases; ++phase) to[phase] = in(spent)[phase];
  }
  __device__ __forceinline__ void look_again() {
    thread = opaque(static_cast<int>(threadIdx.x));
    warp = thread / kWarp;
    lane = thread % kWarp;
    g = lane / 4;
    t = lane % 4;
    row_group = warp % kGroups;
    k_group = warp / kGroups;
  }

  template <class T>
  __device__ __forceinline__ T* in(const Place<T>& place) const {
    return reinterpret_cast<T*>(memory + place.offset);
  }

  __device__ __forceinline__ uint32_t* event(Event which) const {
    return p.exchanged.events + which * (kBytesPerLine / 4);
  }

  // All threads: what they have written can be read behind `wait` for this event.
  __device__ __forceinline__ void signal(Event which) const {
    __syncthreads();
    if (thread == 0) add_to(event(which));
  }

  // All threads, until so many blocks have signalled it in each step up to this one. What they have written the first
  // thread may then take by bulk copies.
  __device__ __forceinline__ void wait(Event which, int64_t step, int blocks) const {
    if (thread == 0) {
      wait_for(event(which), static_cast<uint32_t>((step + 1) * blocks));
      order_global_before_copies();
    }
    __syncthreads();
  }

  struct Halves {
    uint16_t part[2];
  };
  __device__ __forceinline__ Halves split(float scaled) {
    out_of_range = out_of_range || !(fabsf(scaled) <= 65504.0f);
    const uint16_t high = half_bits(scaled);
    return {{high, kParts == 2 ? half_bits(scaled - half_value(high)) : uint16_t{0}}};
  }

  __device__ __forceinline__ static uint32_t pair_of(const Halves (&two)[2], int part) {
    return two[0].part[part] | static_cast<uint32_t>(two[1].part[part]) << 16;
  }

  // c += a b over 16 k; see persistent.h
  template <int kPartsA, int M, int N>
  __device__ __forceinline__ static void multiply(float (&c)[M][N][4], const uint32_t (&a)[kPartsA][M][4],
                                                  const uint32_t (&b)[kParts][N][2]) {
    float sum[M][N][4] = {};
    if constexpr (kPartsA == 2) multiply_add(FP16{}, sum, a[kPartsA - 1], b[0]);
    if constexpr (kParts == 2) multiply_add(FP16{}, sum, a[0], b[kParts - 1]);
    multiply_add(FP16{}, sum, a[0], b[0]);
    add(c, sum);
  }

  // Where the lane reads its fragments of B from: the first of [parts, rows, stride], of 8 rows and 16 columns. Those
  // of other rows and columns lie as far from there as they do from the first.
  __device__ __forceinline__ const uint16_t* b_of_lane(const uint16_t* from, int rows, int stride) const {
    const int part = kParts == 2 ? lane / 16 : 0;
    return from + (part * rows + lane % 8) * stride + lane / 8 % 2 * 8;
  }
  template <int N>
  __device__ __forceinline__ static void load_b(uint32_t (&b)[kParts][N][2], int n, const uint16_t* at) {
    uint32_t r[4];
    load_fragments(r, at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[0][n][i] = r[i];
      b[kParts - 1][n][i] = r[2 * (kParts - 1) + i];
    }
  }

  // Gives a warp's sums of a row group to the sums of all k groups, [kGroups, rows, stride].
  template <int M, int N>
  __device__ __forceinline__ void leave(float* sums, int stride, const float (&c)[M][N][4]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int row = 32 * row_group + 16 * m + g;
      if (row - g >= s.rows) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float* to = sums + (k_group * kMostRows + row) * stride + 8 * n + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 two;
          two.x = c[m][n][2 * half];
          two.y = c[m][n][2 * half + 1];
          *reinterpret_cast<float2*>(to + half * 8 * stride) = two;
        }
      }
    }
  }

  // The sums over the k groups of two, or four, neighbours
  __device__ __forceinline__ static float2 two_sums(const float* sums, int stride, int row, int col) {
    float2 found = {};
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const float2 part = *reinterpret_cast<const float2*>(sums + (k * kMostRows + row) * stride + col);
      found.x += part.x;
      found.y += part.y;
    }
    return found;
  }
  __device__ __forceinline__ static void four_sums(const float* sums, int stride, int row, int col, float (&found)[4]) {
#pragma unroll
    for (float& one : found) one = 0.0f;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(sums + (k * kMostRows + row) * stride + col);
      found[0] += part.x;
      found[1] += part.y;
      found[2] += part.z;
      found[3] += part.w;
    }
  }

  __device__ __forceinline__ void step(const StepFactors& factors, float gradient, float& w, float& s0,
                                       float& s1) const {
    UpdateRule rule = p.rule;
    rule.kind = kKind;
    update(rule, factors, gradient, w, s0, s1);
  }
  __device__ __forceinline__ void step(const StepFactors& factors, float gradient, const Kept& kept, int i) const {
    float* value = in(kept.place) + i;
    step(factors, gradient, value[0], value[kept.count], value[2 * kept.count]);
  }
  // Of a weight, beside whose gradient the prior's stands
  __device__ __forceinline__ void step(const StepFactors& factors, float gradient, Held& held, int i) const {
    step(factors, Math<float>::fma(p.weight_prior, held.w[i], gradient), held.w[i], held.s0[i], held.s1[i]);
  }

  // `at` is the element's index in the tensors, or -1 where there is none
  __device__ __forceinline__ static void fetch(const Trained& from, int64_t at, float& w, float& s0, float& s1) {
    w = at >= 0 ? from.value[at] : 0.0f;
    s0 = kStates > 0 && at >= 0 ? from.state0[at] : 0.0f;
    s1 = kStates > 1 && at >= 0 ? from.state1[at] : 0.0f;
  }
  __device__ __forceinline__ void fetch(const Trained& from, int64_t at, const Kept& kept, int i) const {
    float* value = in(kept.place) + i;
    fetch(from, at, value[0], value[kept.count], value[2 * kept.count]);
  }
  __device__ __forceinline__ static void give_back(const Trained& to, int64_t at, float w, float s0, float s1) {
    if (at < 0) return;
    to.value[at] = w;
    if constexpr (kStates > 0) to.state0[at] = s0;
    if constexpr (kStates > 1) to.state1[at] = s1;
  }
  __device__ __forceinline__ void give_back(const Trained& to, int64_t at, const Kept& kept, int i) const {
    const float* value = in(kept.place) + i;
    give_back(to, at, value[0], value[kept.count], value[2 * kept.count]);
  }

  template <class IndexOf>
  __device__ __forceinline__ static void fetch(const Trained& from, Held& held, const IndexOf& index_of) {
#pragma unroll
    for (int i = 0; i < 16; ++i) fetch(from, index_of(i), held.w[i], held.s0[i], held.s1[i]);
  }
  template <class IndexOf>
  __device__ __forceinline__ static void give_back(const Trained& to, const Held& held, const IndexOf& index_of) {
#pragma unroll
    for (int i = 0; i < 16; ++i) give_back(to, index_of(i), held.w[i], held.s0[i], held.s1[i]);
  }

  // After the last step: whether every number of every block was in range, so that parameters may change.
  __device__ __forceinline__ bool ends_well() const {
    if (out_of_range) add_to(event(kOutOfRange));
    signal(kEnd);
    wait(kEnd, 0, s.encoder_blocks + s.decoder_blocks);
    return read_through(event(kOutOfRange)) == 0;
  }

  // Sums over the rows of a minibatch, four at a time, of columns that are 0 beyond it: of one is enough.
  __device__ __forceinline__ float dot(const float* a, const float* b) const {
    float sums[4] = {};
#pragma unroll 4
    for (int row = 0; row < s.rows; row += 4) {
      const float4 left = *reinterpret_cast<const float4*>(a + row), right = *reinterpret_cast<const float4*>(b + row);
      sums[0] = Math<float>::fma(left.x, right.x, sums[0]);
      sums[1] = Math<float>::fma(left.y, right.y, sums[1]);
      sums[2] = Math<float>::fma(left.z, right.z, sums[2]);
      sums[3] = Math<float>::fma(left.w, right.w, sums[3]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  __device__ __forceinline__ static float total(const float* a, int size) {
    float sums[4] = {};
    for (int row = 0; row < size; row += 4) {
      const float4 four = *reinterpret_cast<const float4*>(a + row);
      sums[0] += four.x;
      sums[1] += row + 1 < size ? four.y : 0.0f;
      sums[2] += row + 2 < size ? four.z : 0.0f;
      sums[3] += row + 3 < size ? four.w : 0.0f;
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // sum + a b, n of them from float4s; n is a multiple of 4
  __device__ __forceinline__ static float add_dot(float sum, const float* a, const float* b, int n) {
#pragma unroll 2
    for (int i = 0; i < n; i += 4) {
      const float4 left = *reinterpret_cast<const float4*>(a + i), right = *reinterpret_cast<const float4*>(b + i);
      sum = Math<float>::fma(left.x, right.x, sum);
      sum = Math<float>::fma(left.y, right.y, sum);
      sum = Math<float>::fma(left.z, right.z, sum);
      sum = Math<float>::fma(left.w, right.w, sum);
    }
    return sum;
  }
};

// --- the encoder -----------------------------------------------------------------------------------------------------

template <Precision kPrecision, UpdateKind kKind>
struct Encoder : Block<kPrecision, kKind> {
  using Base = Block<kPrecision, kKind>;
  using Base::fetch, Base::g, Base::in, Base::k_group, Base::kChunkHalves, Base::kParts, Base::lane, Base::p,
      Base::row_group, Base::s, Base::strides, Base::t, Base::thread, Base::warp;

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
      kl += p.estimator == Estimator::sgvb_b ? gaussian_kl(mu, logvar) : 0.5f * (z * z - e * e - logvar);
    }
    p.exchanged.kl_parts[step * s.most_size + datapoint] = kl;
  }

  __device__ __forceinline__ void derive_latents(int size) {
    add_parts<1>(p.exchanged.z_parts, s.hidden_blocks, strides.latents, size,
                 [&](int i, int datapoint, int j, const float (&sums)[1]) {
                   const float* own = latent(i);
                   const float mu = own[j], logvar = own[s.latents + j], e = own[2 * s.latents + j];
                   const bool sgvb_b = p.estimator == Estimator::sgvb_b;
                   const float in_z = sgvb_b ? sums[0] : sums[0] - p.beta * own[3 * s.latents + j];
                   const float from_noise = 0.5f * standard_deviation(logvar) * (in_z * e);
                   float* to = p.exchanged.head_grads + j * kColumn + datapoint;
                   to[0] = sgvb_b ? in_z - p.beta * mu : in_z;
                   to[s.latents * kColumn] =
                       p.logvar_scale *
                       (sgvb_b ? from_noise - p.beta * gaussian_kl_grad_logvar(logvar) : from_noise + 0.5f * p.beta);
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

// --- the decoder -----------------------------------------------------------------------------------------------------

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

template <Precision kPrecision, UpdateKind kKind>
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ Arguments p) {
#if defined(VAE_FAST_CUDA_EMULATION) || __CUDA_ARCH__ >= 900
  if (static_cast<int>(blockIdx.x) < p.sizes.encoder_blocks) {
    Encoder<kPrecision, kKind>(p).run();
  } else {
    Decoder<kPrecision, kKind>(p).run();
  }
#endif
}

// --- before and after ------------------------------------------------------------------------------------------------

constexpr int kGatherThreads = 256;

// 16 pixels a thread
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Gather p) {
  const Here here(p.now, blockIdx.y);
  const int64_t step = here.step;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.factors[blockIdx.y] = factors_of(p.optimizer, here.own().lr, *p.updates + step + 1);
  }
  const int64_t pieces = p.row_bytes / 16, piece = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  const int64_t b = piece / pieces, col = piece % pieces * 16;
  if (b >= here.size) return;
  const int64_t row = p.rows[step * p.width + b], seed = p.now.seeds[2 * step + 1];
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i) {
    float x = col + i < p.data.cols ? datum(p.data, row, col + i) : 0.0f;
    if (p.data.dynamic && col + i < p.data.cols) x = bernoulli_draw(seed, b * p.data.cols + col + i, x * p.data.scale);
    words[i / 4] |= static_cast<uint32_t>(x) << 8 * (i % 4);
  }
  uint4 all;
  all.x = words[0];
  all.y = words[1];
  all.z = words[2];
  all.w = words[3];
  *reinterpret_cast<uint4*>(p.x + (blockIdx.y * p.most_size + b) * p.row_bytes + col) = all;
}

// A step a block of one warp
__global__ void __launch_bounds__(kWarp) terms_kernel(const __grid_constant__ Launch p, float* terms) {
  const int64_t step = blockIdx.x, size = p.size[step];
  const int lane = static_cast<int>(threadIdx.x);
  double ll = 0.0, kl = 0.0;
  for (int i = lane; i < p.sizes.output_blocks; i += kWarp)
    ll += p.exchanged.ll_parts[step * p.sizes.output_blocks + i];
  for (int64_t i = lane; i < size; i += kWarp) kl += p.exchanged.kl_parts[step * p.sizes.most_size + i];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    ll += __shfl_xor_sync(0xffffffffu, ll, offset);
    kl += __shfl_xor_sync(0xffffffffu, kl, offset);
  }
  if (lane != 0) return;
  ll /= static_cast<double>(size);
  kl /= static_cast<double>(size);
  terms[3 * step] = static_cast<float>(ll - static_cast<double>(p.beta) * kl);
  terms[3 * step + 1] = static_cast<float>(ll);
  terms[3 * step + 2] = static_cast<float>(kl);
}

template <Precision kPrecision, UpdateKind kKind>
int launch_kernel(const Launch& launch, cudaStream_t stream) {
  const auto kernel = persistent_kernel<kPrecision, kKind>;
  const Arguments arguments(launch, Block<kPrecision, kKind>::kParts);
  const size_t bytes = static_cast<size_t>(std::max(arguments.encoder.bytes, arguments.decoder.bytes));
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
    return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.sizes.encoder_blocks + launch.sizes.decoder_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments);
  return cudaGetLastError();
}

template <Precision kPrecision>
int launch_kernel(const Launch& launch, cudaStream_t stream) {
  switch (launch.rule.kind) {
    case UpdateKind::sgd:
      return launch_kernel<kPrecision, UpdateKind::sgd>(launch, stream);
    case UpdateKind::momentum:
      return launch_kernel<kPrecision, UpdateKind::momentum>(launch, stream);
    case UpdateKind::adagrad:
      return launch_kernel<kPrecision, UpdateKind::adagrad>(launch, stream);
    case UpdateKind::adam:
      return launch_kernel<kPrecision, UpdateKind::adam>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

// Halves of h', of the gradient in the logits and of the columns
struct HalvesOf {
  int64_t hidden, grad, columns;
  explicit HalvesOf(const Sizes& s) {
    const Strides strides(s);
    hidden = int64_t{2} * strides.hidden_chunks * halves_of_chunk(2);
    grad = int64_t{1} * strides.data_chunks * halves_of_chunk(2);
    columns = int64_t{2} * s.hidden_blocks * kUnits * strides.own_columns;
  }
};

}  // namespace

const char* phase_name(bool encoder, int phase) {
  static const char* const names[2][kPhases] = {
      {"wait for z", "decoder's hidden layer", "fetch x", "wait for its units", "logits", "wait for their gradient",
       "backward to z", "update of the hidden layer", "update of the output"},
      {"wait for x", "encoder's hidden layer", "noise", "wait for the heads", "z", "KL", "wait for the gradient in z",
       "gradient in the heads", "wait for it", "backward to the hidden layer", "update"}};
  return names[encoder ? 1 : 0][phase];
}

std::string why_not(const Network& network, const Objective& objective, const Data& data, Precision precision,
                    int64_t models, int64_t most_size, int multiprocessors, int shared_bytes) {
  if (models != 1) return "several models";
  if (network.encoder_hidden.size() != 1 || network.decoder_hidden.size() != 1) return "more than one hidden layer";
  if (network.likelihood != Likelihood::bernoulli) return "a Gaussian decoder";
  if (objective.estimator == Estimator::wake_sleep) return "the estimator \"wake_sleep\"";
  if (objective.num_samples != 1) return "several samples of z";
  if (data.dtype != DType::u8 && data.dtype != DType::bits) return "data that are not bytes or bits";
  if (most_size > kMostRows) return "minibatches of more than 128 datapoints";
  if (network.latent_dim > kMostLatents) return "more than 64 latents";
  if (network.decoder_hidden[0] > kMostUnits || network.encoder_hidden[0] > 8 * multiprocessors)
    return "too many hidden units";
  const Sizes sizes = sizes_of(network, most_size);
  if (sizes.row_bytes > kMostRowBytes) return "more than 1008 pixels";
  if (sizes.encoder_blocks + sizes.decoder_blocks > multiprocessors) return "more blocks than multiprocessors";
  const int parts = precision == Precision::exact ? 2 : 1;
  const int bytes = std::max(EncoderMemory(sizes, parts).bytes, DecoderMemory(sizes, parts).bytes);
  return bytes > shared_bytes ? "more shared memory than a block can have" : "";
}

Sizes sizes_of(const Network& network, int64_t most_size) {
  Sizes s = {};
  s.data_dim = static_cast<int>(network.data_dim);
  s.latents = static_cast<int>(network.latent_dim);
  s.encoder_units = static_cast<int>(network.encoder_hidden[0]);
  s.decoder_units = static_cast<int>(network.decoder_hidden[0]);
  s.most_size = static_cast<int>(most_size);
  s.rows = ceil_of(s.most_size, 16) * 16;
  s.row_bytes = ceil_of(s.data_dim, 16) / 2 * 32 + 16;
  s.encoder_blocks = ceil_of(s.encoder_units, kUnits);
  s.hidden_blocks = ceil_of(s.decoder_units, kUnits);
  s.output_blocks = ceil_of(s.data_dim, kOuts);
  s.decoder_blocks = std::max(s.hidden_blocks, s.output_blocks);
  return s;
}

Parameters parameters_of(const std::vector<Trained>& p) {
  return {p[0], p[1], {p[2], p[4]}, {p[3], p[5]}, p[6], p[7], p[8], p[9]};
}

Exchanged lay_out(const Sizes& s, int64_t most_steps, void* memory) {
  Exchanged e = {};
  char* at = static_cast<char*>(memory);
  const auto place = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += (count * static_cast<int64_t>(sizeof *pointer) + 255) / 256 * 256;
  };
  const HalvesOf halves(s);
  const Strides strides(s);
  place(e.hidden, halves.hidden);
  place(e.grad, halves.grad);
  place(e.columns, halves.columns);
  place(e.z, int64_t{1} * s.most_size * strides.latents);
  place(e.head_grads, int64_t{2} * s.latents * kColumn);
  place(e.events, kEvents * (kBytesPerLine / 4));
  place(e.x, most_steps * s.most_size * s.row_bytes);
  place(e.head_parts, int64_t{2} * s.most_size * s.encoder_blocks * s.latents);
  place(e.z_parts, int64_t{1} * s.most_size * s.hidden_blocks * strides.latents);
  place(e.cycles, int64_t{kPhases} * (s.encoder_blocks + s.decoder_blocks));
  place(e.ll_parts, most_steps * s.output_blocks);
  place(e.kl_parts, most_steps * s.most_size);
  return e;
}

int64_t bytes_of(const Sizes& s, int64_t most_steps) {
  // The last buffer ends where the next would begin.
  const Exchanged e = lay_out(s, most_steps, nullptr);
  const auto end = reinterpret_cast<uintptr_t>(e.kl_parts + most_steps * s.most_size);
  return static_cast<int64_t>((end + 255) / 256 * 256);
}

int launch(const Gather& gather, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(gather.most_size * gather.row_bytes / 16, kGatherThreads)),
                        static_cast<unsigned>(gather.steps));
  config.blockDim = dim3(kGatherThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, gather_kernel, gather);
  return cudaGetLastError();
}

int launch(const Launch& launch, float* terms, cudaStream_t stream) {
  const Exchanged& e = launch.exchanged;
  // What no block writes, beyond the last unit, pixel, latent and row, is multiplied by zeros: it must not be NaN.
  // Events begin at 0.
  const size_t bytes =
      reinterpret_cast<uintptr_t>(e.events + kEvents * (kBytesPerLine / 4)) - reinterpret_cast<uintptr_t>(e.hidden);
  if (cudaError_t error = cudaMemsetAsync(e.hidden, 0, bytes, stream)) return error;
  if (launch.timed) {
    const int blocks = launch.sizes.encoder_blocks + launch.sizes.decoder_blocks;
    if (cudaError_t error =
            cudaMemsetAsync(e.cycles, 0, sizeof(int64_t) * kPhases * static_cast<size_t>(blocks), stream))
      return error;
  }
  const int error = launch.precision == Precision::exact ? launch_kernel<Precision::exact>(launch, stream)
                                                         : launch_kernel<Precision::fast>(launch, stream);
  if (error) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.steps));
  config.blockDim = dim3(kWarp);
  config.stream = stream;
  cudaLaunchKernelEx(&config, terms_kernel, launch, terms);
  return cudaGetLastError();
}

int out_of_range(const Launch& launch, bool& found, cudaStream_t stream) {
  uint32_t count = 0;
  cudaError_t error = cudaMemcpyAsync(&count, launch.exchanged.events + kOutOfRange * (kBytesPerLine / 4), sizeof count,
                                      cudaMemcpyDeviceToHost, stream);
  if (!error) error = cudaStreamSynchronize(stream);
  found = count != 0;
  return error;
}

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
