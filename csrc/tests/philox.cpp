// Philox4x32-10 against the known-answer vectors of Random123 (kat_vectors, "philox4x32 10").
#include "math/philox.h"

#include <cstdio>

int main() {
  struct {
    uint32_t counter[4], key[2], wanted[4];
  } vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},  // the digits of pi
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  int wrong = 0;
  for (auto& v : vectors) {
    vae_fast::philox4x32_10<float>(&v.counter, v.key[0], v.key[1]);
    for (int i = 0; i < 4; ++i) {
      if (v.counter[i] == v.wanted[i]) continue;
      std::fprintf(stderr, "word %d: got %08x, wanted %08x\n", i, v.counter[i], v.wanted[i]);
      wrong = 1;
    }
  }
  return wrong;
}
