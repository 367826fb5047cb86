// The schemas of every op of the compiled library, in one place. Implementations are registered next to their kernels.
#include <torch/csrc/stable/library.h>

// Rotary. Tables are cos, sin of (max_position, rotary_dim / 2), or (1 or batch, seqlen, rotary_dim / 2) when already
// gathered. `flags` is a sum of 1 (interleaved), 2 (heads first: batch, nheads, seqlen, head_dim) and 4 (the negative
// angle): one int, since every bool of a schema costs a call 0.4 us.
#define NEOX_ROTATION \
  "Tensor cos, Tensor sin, Tensor? position_ids, Tensor? seqlen_offsets, Tensor? cu_seqlens, SymInt offset, int flags"

// Causal softmax. rng is (2,) int64, seed and offset. `flags` is a sum of 1 (causal) and 2, 4 or 6 (the result in float32,
// bfloat16 or float16, else in the dtype of the scores); in the backward also 8 (give the row sums).
#define NEOX_SOFTMAX \
  "float scale, Tensor? key_padding_mask, Tensor? attn_mask, Tensor? head_mask, Tensor? rng, float dropout_p, int flags"
#define NEOX_SOFTMAX_BACKWARD "float scale, Tensor? head_mask, Tensor? rng, float dropout_p, int flags"

STABLE_TORCH_LIBRARY(neox_kernels, m) {
  m.def("cpu_isa(str name) -> str");

  m.def("rotary(Tensor x, " NEOX_ROTATION ") -> Tensor");
  m.def("rotary_qk(Tensor q, Tensor k, " NEOX_ROTATION ") -> (Tensor, Tensor)");
  // The same without a gradient: autograd's wrapper in Python, which the others get, costs a call 8 us.
  m.def("rotary.inference(Tensor x, " NEOX_ROTATION ") -> Tensor");
  m.def("rotary_qk.inference(Tensor q, Tensor k, " NEOX_ROTATION ") -> (Tensor, Tensor)");
  m.def("rotary_(Tensor(a!) x, " NEOX_ROTATION ") -> ()");
  m.def("rotary_qk_(Tensor(a!) q, Tensor(b!) k, " NEOX_ROTATION ") -> ()");
  m.def(
      "rotary_kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor cache_seqlens, Tensor? position_ids, int flags) -> Tensor");

  // The second result is for the backward: the probabilities before head mask and dropout, where there are such.
  m.def("causal_softmax(Tensor scores, " NEOX_SOFTMAX ") -> (Tensor, Tensor)");
  m.def("causal_softmax.inference(Tensor scores, " NEOX_SOFTMAX ") -> Tensor");
  m.def("causal_softmax_(Tensor(a!) scores, " NEOX_SOFTMAX ") -> ()");
  m.def("causal_softmax_backward(Tensor grad, Tensor probs, " NEOX_SOFTMAX_BACKWARD ") -> (Tensor, Tensor)");
  m.def("causal_softmax_backward.inference(Tensor grad, Tensor probs, " NEOX_SOFTMAX_BACKWARD ") -> (Tensor, Tensor)");

  // On a CPU: q, k and v of (batch, seqlen, nheads, head_dim); query i sees key j where j <= i + k_len - q_len.
  m.def("causal_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  m.def("serves_causal_attention(ScalarType dtype) -> bool");

  m.def("gelu_tanh(Tensor x) -> Tensor");
  m.def("gelu_tanh.inference(Tensor x) -> Tensor");
  m.def("gelu_tanh_(Tensor(a!) x, Tensor? bias) -> ()");  // of x + bias, which is of the last dimension

  // Varlen. The first dimensions of a tensor are those of `inverse` (one, without), and of its result those of `indices`;
  // result row r is row indices[r], or zero where that is -1. The gradient is the same op with the two exchanged.
  m.def("gather_rows(Tensor[] tensors, Tensor indices, Tensor? inverse) -> Tensor[]");
  m.def("gather_rows.inference(Tensor[] tensors, Tensor indices, Tensor? inverse) -> Tensor[]");
  // indices of (capacity,), cu_seqlens, inverse, and (tokens, longest sequence, invalid values).
  m.def(
      "varlen_metadata(Tensor attention_mask, SymInt capacity, SymInt max_seqlen) -> (Tensor, Tensor, Tensor, Tensor)");
}
