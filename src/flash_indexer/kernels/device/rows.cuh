#pragma once
// A tile of R rows of queries: HG heads of one key head, R / HG tokens; rows that are left over are padding.
template <int HG, int R>
struct Rows {
  static constexpr int TOKENS = R / HG;
  static constexpr bool TOKEN_MAJOR = HG > TOKENS;
  static __device__ __forceinline__ int token(int r) { return TOKEN_MAJOR ? r / HG : r % TOKENS; }
  static __device__ __forceinline__ int head(int r) { return TOKEN_MAJOR ? r % HG : r / TOKENS; }
  static __device__ __forceinline__ bool padding(int r) { return r >= TOKENS * HG; }
};
