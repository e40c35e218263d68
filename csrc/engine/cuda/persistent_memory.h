// Who has what in the persistent kernel: how the work is cut into blocks, and where everything lies in their shared
// memory. All of it is counted on the host and handed to the kernel.
#pragma once

#include <algorithm>

#include "on_chip.cuh"
#include "persistent.h"
#include "product.cuh"

namespace vae_fast {
namespace engine {
namespace persistent {

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

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
