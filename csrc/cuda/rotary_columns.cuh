// Rotary out of place. A thread owns neighbouring columns of some heads of a token, whether they are rotated or only copied,
// and the threads beside it own the columns beside them: so memory is written by whole sectors. A sector that two
// instructions write in parts costs the GPU a read and often a second write of it: for 24 rotated columns of 96 in bfloat16
// this was measured as half as much again in both directions.
#pragma once
#include "cuda/rotary_tokens.cuh"

namespace neox {
namespace {

// Memory answers after hundreds of cycles: what a thread reads before it writes.
constexpr int kHeadsAtOnce = 4;

// How a thread's columns turn: y = x * c + partner * s. Units of kUnit columns have their partners side by side.
template <int kVec, int kUnit>
struct Turn {
  static constexpr int kUnits = kVec / kUnit;
  float c[kVec], s[kVec];
  int partner[kUnits];  // its first column; -1 for a unit behind the rotated columns
};

// Whether the rotated columns may end within a thread's: they are a multiple of two halves, each of which is one of kUnit.
template <int kVec, int kUnit, bool kInterleaved>
constexpr bool kMayEndWithin = (kInterleaved ? kUnit : 2 * kUnit) < kVec;

template <class T, int kVec, int kUnit, bool kInterleaved>
__device__ void find_turn(const RotaryArgs& args, const RotaryToken& token, int first, Turn<kVec, kUnit>& turn) {
  const int rotary_dim = static_cast<int>(args.rotary_dim), half = rotary_dim / 2;
#pragma unroll
  for (int u = 0; u < kVec / kUnit; ++u) {
    const int column = first + u * kUnit, at = u * kUnit;
    turn.partner[u] = -1;
    if (kMayEndWithin<kVec, kUnit, kInterleaved> && column >= rotary_dim) continue;
    if constexpr (!kInterleaved) {
      const bool in_first = column < half;
      turn.partner[u] = in_first ? column + half : column - half;
      float c[kUnit], s[kUnit];
      load_cos_sin<T>(args, token, in_first ? column : column - half, c, s);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) turn.c[at + i] = c[i], turn.s[at + i] = in_first ? -s[i] : s[i];
    } else if constexpr (kUnit > 1) {
      turn.partner[u] = column;
      float c[kUnit / 2], s[kUnit / 2];
      load_cos_sin<T>(args, token, column / 2, c, s);
#pragma unroll
      for (int i = 0; i < kUnit / 2; ++i) {
        turn.c[at + 2 * i] = turn.c[at + 2 * i + 1] = c[i];
        turn.s[at + 2 * i] = -s[i], turn.s[at + 2 * i + 1] = s[i];
      }
    } else {
      turn.partner[u] = column ^ 1;
      float c[1], s[1];
      load_cos_sin<T>(args, token, column / 2, c, s);
      turn.c[at] = c[0], turn.s[at] = column % 2 == 0 ? -s[0] : s[0];
    }
  }
}

// `own` becomes what it is turned to.
template <class T, int kVec, int kUnit, bool kInterleaved>
__device__ void turn_columns(const Turn<kVec, kUnit>& turn, const Packed<T, kUnit> (&partner)[kVec / kUnit],
                             Packed<T, kVec>& own) {
  constexpr bool kNeighbours = kInterleaved && kUnit > 1;
  constexpr int kUnits = kVec / kUnit, kWords = Packed<T, kUnit>::kCount;
  float x[kVec], other[kVec], y[kVec];
  to_floats(own, x);
  if constexpr (!kNeighbours) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) to_floats(partner[u], &other[u * kUnit]);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    // Which product is fused is said here: left to the compiler, it differs between widths, and so would results.
    y[i] = __fmaf_rn(x[i], turn.c[i], __fmul_rn(kNeighbours ? x[i ^ 1] : other[i], turn.s[i]));
  }
  Packed<T, kVec> out;
  from_floats(y, out);
#pragma unroll
  for (int i = 0; i < kUnits * kWords; ++i) {
    if (!kMayEndWithin<kVec, kUnit, kInterleaved> || turn.partner[i / kWords] >= 0) own.words.at[i] = out.words.at[i];
  }
}

template <class T, int kVec, int kUnit, bool kInterleaved>
__device__ void walk_heads(const RotaryTensor& tensor, const T* x, T* y, int first, bool rotates,
                           const Turn<kVec, kUnit>& turn) {
  constexpr int kUnits = kVec / kUnit;
  constexpr bool kNeighbours = kInterleaved && kUnit > 1;
  x += threadIdx.y * tensor.in_stride_head;
  y += threadIdx.y * tensor.out_stride_head + first;
  const int64_t in_step = blockDim.y * tensor.in_stride_head, out_step = blockDim.y * tensor.out_stride_head;
  const uint32_t nheads = static_cast<uint32_t>(tensor.nheads);
#pragma unroll 1
  for (uint32_t head = threadIdx.y; head < nheads; head += kHeadsAtOnce * blockDim.y) {
    Packed<T, kVec> own[kHeadsAtOnce];
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      if (head + h * blockDim.y < nheads) own[h] = Packed<T, kVec>(x + h * in_step + first);
    }
    if (rotates) {
      Packed<T, kUnit> partner[kHeadsAtOnce][kUnits];
      if constexpr (!kNeighbours) {
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
          if (head + h * blockDim.y >= nheads) break;
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            const bool none = kMayEndWithin<kVec, kUnit, kInterleaved> && turn.partner[u] < 0;
            partner[h][u] = Packed<T, kUnit>(x + h * in_step + (none ? first + u * kUnit : turn.partner[u]));
          }
        }
      }
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        if (head + h * blockDim.y >= nheads) break;
        turn_columns<T, kVec, kUnit, kInterleaved>(turn, partner[h], own[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      if (head + h * blockDim.y < nheads) own[h].store(y + h * out_step);
    }
    x += kHeadsAtOnce * in_step;
    y += kHeadsAtOnce * out_step;
  }
}

// Four blocks to a multiprocessor: with the registers of five, what is under way at once spills on sm_100 and sm_120.
template <class T, int kVec, int kUnit, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 4) rotary_columns_kernel(const __grid_constant__ RotaryArgs args) {
  Place place;
  if (!find_place(args, place)) return;
  const RotaryToken token = locate_token(args, place.batch, place.row);
  const int head_dim = static_cast<int>(args.head_dim);
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) * kVec; first < head_dim; first += static_cast<int>(blockDim.x) * kVec) {
    const bool rotates = !token.padding && first < args.rotary_dim;
    Turn<kVec, kUnit> turn;
    if (rotates) find_turn<T, kVec, kUnit, kInterleaved>(args, token, first, turn);
#pragma unroll 1
    for (int t = 0; t < args.ntensors; ++t) {
      const RotaryTensor& tensor = args.tensors[t];
      const T* x;
      T* y;
      if (!find_rows(args, tensor, place, x, y)) continue;
      walk_heads<T, kVec, kUnit, kInterleaved>(tensor, x, y, first, rotates && tensor.rotate, turn);
    }
  }
}

}  // namespace
}  // namespace neox
