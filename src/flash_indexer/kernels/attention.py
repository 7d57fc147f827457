"""Attention forward with its logsumexp, and in the same pass the KL of each head's index scores to its attention.

    a[t,h,s] = scale · q[t,h]·k[s,g]          x[t,h,s] = w[t,h] · max(index_q[t,h]·index_k[s], 0)
    out[t,h] = sum_s exp(a - lse) · v[s,g]    lse[t,h] = log sum_s exp(a)    lsx[t,h] = log sum_s exp(x)
    kl[t,h]  = sum_s exp(a - lse) · (a - x) - lse + lsx                      over key_start[t] <= s < key_end[t]

A tile of 128 rows holds HG heads (those of one key head g) of 128 // HG tokens, so that rows share their keys:

    HG > 128 // HG    row = token · HG + head      one copy a token
    otherwise         row = head · TOKENS + token  one copy a head

    warps 0-3, 4-7   64 rows each: S = q k^T and X = index_q index_k^T [64, BN], P [64, BN] and O [64, V] in registers
    warp 8           feeds by TMA: the row tile of the next item while this one is under way; keys and values in rings
    warps 9-11       idle (their registers go to the consumers)

    tensor cores     | S X of tile i+1 | O += P v of tile i | S X of i+2 ...      of one warpgroup, while the other one
    everything else  |                 | softmaxes of i+1   |                     is at its softmaxes

Only key tiles that cross some row's interval are masked, and they come first: every row that sees a key sees one there.
Shifts are in powers of two. m, of a, follows the row's maximum lazily: it is raised when a row
outgrows it by 2^8. n, of x, is the maximum of the first tile that the row sees, raised when a tile's sum passes 1e30. A
row that has seen nothing yet has both at UNSET, with which every term is zero.
"""

import tilelang
import tilelang.language as T

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
PP = 1
REGISTERS = (240, 24)  # consumers, producer

# Accumulator of one thread: s[4g+2h+c] = row 16·warp + lane/4 + 8h, column 8g + 2·(lane%4) + c. Arrays of two are one
# number for each of the thread's two rows h. An item in shared memory: t0, g, first key, tiles, right, left (see build).
SOURCE = r"""
#ifndef FLASH_INDEXER_ATTENTION
#define FLASH_INDEXER_ATTENTION
#define AT_UNSEEN -1e30f
#define AT_UNSET 1e30f
static __device__ __forceinline__ int at_count(int n, int first, int step) {
  asm volatile("" : "+r"(n));
  return n > first ? (int)((unsigned)(n - first + step - 1) / (unsigned)step) : 0;
}
static __device__ __forceinline__ int at_int(const int* p, long long i) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ float at_float(const float* p, long long i) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p + i));
  return v;
}
// keeps what is made of it from being hoisted out of a loop, to where registers run out
static __device__ __forceinline__ int at_opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
static __device__ __forceinline__ int at_address(const void* p) { return (int)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ int at_field(int item, int field) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(item + field * 4));
  return v;
}
// tiles of the item are visited in the order 0 .. right - 1, left .. tiles - 1 (these are masked), right .. left - 1
static __device__ __forceinline__ int at_masked(int item) {
  return at_field(item, 4) - 1 + at_field(item, 3) - at_field(item, 5);
}
static __device__ __forceinline__ int at_whole(int item) { return at_field(item, 5) - at_field(item, 4); }
static __device__ __forceinline__ int at_tile(int item, int i) {
  const int right = at_field(item, 4);
  return i < right ? i : i - right + at_field(item, 5);
}
template <int BN>
static __device__ __forceinline__ int at_key(int item, int i) {
  const int masked = at_masked(item) + 1;
  return at_field(item, 2) - BN * (i < masked ? at_tile(item, i) : i - masked + at_field(item, 4));
}
// every lane of the producer writes the same item: the one that then arrives at the barrier has written it, too
static __device__ __forceinline__ void at_put(int item, const int* items, int at) {
#pragma unroll
  for (int f = 0; f < 6; ++f)
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(item + f * 4), "r"(at_int(items, (long long)at * 8 + f)) : "memory");
}
static __device__ __forceinline__ int at_row(int h) {
  return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2) + 8 * h;
}
template <int HG>
struct Rows {
  static constexpr int TOKENS = 128 / HG;
  static constexpr bool TOKEN_MAJOR = HG > TOKENS;
  static __device__ __forceinline__ int token(int r) { return TOKEN_MAJOR ? r / HG : r % TOKENS; }
  static __device__ __forceinline__ int head(int r) { return TOKEN_MAJOR ? r % HG : r / TOKENS; }
  static __device__ __forceinline__ bool padding(int r) { return r >= TOKENS * HG; }
};
// over the four lanes that share a row
static __device__ __forceinline__ float at_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ __forceinline__ float at_quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
// intervals of the thread's rows: first and end of row 0, of row 1; padding and tokens t >= n see nothing
template <int HG>
static __device__ __forceinline__ void at_limits(int* limits, int item, const int* KS, const int* KE, int n) {
  const int t0 = at_field(item, 0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = at_row(h), t = t0 + Rows<HG>::token(r);
    const bool none = Rows<HG>::padding(r) || t >= n;
    limits[2 * h] = none ? 0 : at_int(KS, t);
    limits[2 * h + 1] = none ? 0 : at_int(KE, t);
  }
}
// weights of the thread's rows, times log2(e)
template <int HG>
static __device__ __forceinline__ void at_weights(float* w, int item, const float* W, int n, int H) {
  const int t0 = at_field(item, 0), g = at_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = at_row(h), t = t0 + Rows<HG>::token(r);
    const bool none = Rows<HG>::padding(r) || t >= n;
    w[h] = none ? 0.f : at_float(W, (long long)t * H + g * HG + Rows<HG>::head(r)) * 1.4426950408889634f;
  }
}
// the i-th masked tile of the item: s = UNSEEN outside of the rows' limits; rows that see their first key get their shift
template <int BN>
static __device__ __forceinline__ void at_mask(float* s, float* m, const int* limits, int item, int i, float scale) {
  const int first = at_field(item, 2) - at_tile(item, i) * BN + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int low = limits[2 * h] - first;
    const unsigned size = limits[2 * h + 1] - limits[2 * h];
    float most = AT_UNSEEN;
#pragma unroll
    for (int g = 0; g < BN / 8; ++g)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[4 * g + 2 * h + c];
        x = (unsigned)(8 * g + c - low) < size ? x : AT_UNSEEN;
        most = fmaxf(most, x);
      }
    most = at_quad_max(most);
    if (m[h] == AT_UNSET && most > 0.5f * AT_UNSEEN) m[h] = most * scale;
  }
}
// x = w · max(x, 0), then as at_mask
template <int BN>
static __device__ __forceinline__ void at_mask_index(
    float* x, float* n, const float* w, const int* limits, int item, int i) {
#pragma unroll
  for (int j = 0; j < BN / 2; ++j) x[j] = fmaxf(x[j], 0.f) * w[j / 2 % 2];
  at_mask<BN>(x, n, limits, item, i, 1.f);
}
// whether some row of the warp outgrew its shift
template <int BN>
static __device__ __forceinline__ int at_outgrown(const float* s, const float* m, float scale) {
  float most[4];
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) most[i % 4] = i < 4 ? s[i] : fmaxf(most[i % 4], s[i]);
  bool grown = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) grown = grown || most[i] * scale > m[i / 2] + 8.f;
  return __any_sync(0xffffffffu, grown);
}
// m = max(m, rowmax(s)), with what was summed under the old shift; o is rescaled by alpha when its product is done
template <int BN, int E>
static __device__ __forceinline__ void at_raise(
    const float* s, float* m, float* l, float* c, float* alpha, float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
    for (int g = 1; g < BN / 8; ++g) most = fmaxf(fmaxf(most, s[4 * g + 2 * h]), s[4 * g + 2 * h + 1]);
    const float fresh = fmaxf(at_quad_max(most) * scale, m[h]), delta = m[h] - fresh;
    alpha[h] = exp2f(delta);
#pragma unroll
    for (int i = 2 * h; i < 2 * h + 2; ++i) {
      if (E) c[i] = (c[i] + delta * l[i]) * alpha[h];
      l[i] *= alpha[h];
    }
    m[h] = fresh;
  }
}
// s = exp2(a - m), x = x - n, with their sums l, c and, of this tile alone, y; READY: x is weighted already
template <int BN, int E, bool READY>
static __device__ __forceinline__ void at_softmax(
    float* s, float* x, const float* m, const float* n, const float* w, float* l, float* y, float* c, float scale) {
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) {
    const int h = i / 2 % 2;
    const float a = fmaf(s[i], scale, -m[h]), e = exp2f(a);
    l[i % 4] += e;
    s[i] = e;
    if (E) {
      x[i] = READY ? x[i] - n[h] : fmaf(fmaxf(x[i], 0.f), w[h], -n[h]);
      c[i % 4] = fmaf(e, a - x[i], c[i % 4]);
      y[i % 4] = i < 4 ? exp2f(x[i]) : y[i % 4] + exp2f(x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(l[i]));  // here, between the exponentials, not after a branch
}
// adds a tile's sum to y; raises n where the sum outgrew it
template <int BN>
static __device__ __forceinline__ void at_add(
    const float* x, float* n, const float* l, float* y, float* sum, float* c) {
  if (__any_sync(0xffffffffu, sum[0] > 1e30f || sum[1] > 1e30f || sum[2] > 1e30f || sum[3] > 1e30f)) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = 0.f;
#pragma unroll
      for (int g = 0; g < BN / 8; ++g) most = fmaxf(fmaxf(most, x[4 * g + 2 * h]), x[4 * g + 2 * h + 1]);
      most = at_quad_max(most);
      n[h] += most;
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        y[i] *= exp2f(-most);
        c[i] += most * l[i];
        sum[i] = 0.f;
#pragma unroll
        for (int g = 0; g < BN / 8; ++g) sum[i] += exp2f(x[4 * g + i] - most);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] += sum[i];
}
// a real, ordered instruction after the wait for the product that reads the old P, or ptxas serialises (C7513)
template <int BN>
static __device__ __forceinline__ void at_pack(void* p, const float* s) {
#pragma unroll
  for (int g = 0; g < BN / 4; ++g) {
    unsigned v;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(s[2 * g + 1]), "f"(s[2 * g]));
    ((unsigned*)p)[g] = v;
  }
}
template <int V>
static __device__ __forceinline__ void at_scale(float* o, const float* by) {
#pragma unroll
  for (int i = 0; i < V / 2; ++i) o[i] *= by[i / 2 % 2];
}
// lse, and lsx and kl where E, of the thread's rows; inverse = 1 / l, 0 for a row that saw nothing
template <int HG, int E>
static __device__ __forceinline__ void at_finish(
    float* inverse, int item, const float* m, const float* n, const float* l, const float* y, const float* c, float* LSE,
    float* LSX, float* KL, int tokens, int H) {
  const int t0 = at_field(item, 0), g = at_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = at_row(h), t = t0 + Rows<HG>::token(r);
    const bool seen = m[h] != AT_UNSET, write = (threadIdx.x & 3) == 0 && !Rows<HG>::padding(r) && t < tokens;
    const long long at = (long long)t * H + g * HG + Rows<HG>::head(r);
    const float total = at_quad_sum(l[2 * h] + l[2 * h + 1]), log_l = log2f(total), ln2 = 0.6931471805599453f;
    inverse[h] = seen ? 1.f / total : 0.f;
    if (write) LSE[at] = seen ? (m[h] + log_l) * ln2 : -INFINITY;
    if (E) {
      const float log_y = log2f(at_quad_sum(y[2 * h] + y[2 * h + 1])), cross = at_quad_sum(c[2 * h] + c[2 * h + 1]);
      if (write) LSX[at] = seen ? (n[h] + log_y) * ln2 : -INFINITY;
      if (write) KL[at] = seen ? (cross * inverse[h] - log_l + log_y) * ln2 : 0.f;
    }
  }
}
template <int HG, int V>
static __device__ __forceinline__ void at_store(const float* o, int item, void* OUT, int tokens, int H) {
  const int t0 = at_field(item, 0), g = at_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = at_row(h), t = t0 + Rows<HG>::token(r);
    if (!Rows<HG>::padding(r) && t < tokens) {
      unsigned* p = (unsigned*)OUT + ((long long)t * H + g * HG + Rows<HG>::head(r)) * (V / 2) + (threadIdx.x & 3);
#pragma unroll
      for (int i = 0; i < V / 8; ++i) {
        unsigned v;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(o[4 * i + 2 * h + 1]), "f"(o[4 * i + 2 * h]));
        p[4 * i] = v;
      }
    }
  }
}
#endif
"""


def build(D, V, E, HG, BN, QS, TMA_STORE):
    """Attention of HG heads a key head, queries and keys of width D, values of width V (multiples of 64).

    E: index head width (32, 64 or 128); 0 leaves the indexer out. BN: keys of a tile. QS: row tiles in shared memory, 1
    or 2. TMA_STORE: whether outputs leave through shared memory, in the place of their queries (V <= D, QS = 2), or
    from registers. Run-time arguments, with TOKENS = 128 // HG:

        Q     [T·H, D] bfloat16; the same memory is read as [T, H·D] where HG <= TOKENS
        K     [S, G·D], VAL [S, G·V] bfloat16
        IQ    as Q with E, IK [S, E] bfloat16, W [T·H] float32   index_q, index_k, weights; not read where E is 0
        KS    [T], KE [T] int32             visible keys of each token
        ITEMS [8·nitems] int32              (t0, g, first, tiles, right, left, 0, 0): TOKENS tokens from t0, heads of g;
                                            key tile j holds the keys first - j·BN + 0 .. BN-1, j = 0 .. tiles - 1;
                                            those with j < right or j >= left are masked, 1 <= right <= left <= tiles.
                                            Where some row sees its last key in tile j, j < right
        OUT   as Q with V, bfloat16; LSE, LSX, KL [T·H] float32     written; LSX and KL where E is not 0
        H, tokens, nitems, grid int32, scale float32        CTA c of `grid` takes the items c, c + grid, ...; scale
                                                            times log2(e)
    """
    TOKENS = 128 // HG
    BOX, BOXES = (HG, TOKENS) if HG > TOKENS else (TOKENS, HG)
    PIECE = min(BOX, 64)  # rows of one store
    assert not TMA_STORE or (V <= D and QS == 2 and 64 % PIECE == 0 and BOX % PIECE == 0 and BOX * BOXES == 128)
    rows = T.GemmWarpPolicy.FullRow
    nq, nk, nt, nx, ni = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt"), T.dynamic("nx"), T.dynamic("ni")
    kd, kv = T.dynamic("kd"), T.dynamic("kv")
    TOKEN_MAJOR = HG > TOKENS
    qd, qe, qv = (D, max(E, 8), V) if TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qe"), T.dynamic("qv"))

    @T.macro
    def release(empty, stage, tx):
        if tx % 128 == 0:
            T.mbarrier_arrive(empty[stage])

    # box b of the row tile: rows b·BOX .. of shared memory; global row, column (in heads)
    def box_row(t0, g, b, H):
        return (t0 + b) * H + g * HG if TOKEN_MAJOR else t0

    def box_head(g, b):
        return 0 if TOKEN_MAJOR else g * HG + b

    @T.macro
    def load_rows(source, target, slot, full, width, t0, g, H):
        panel = min(width, 64)
        for b in list(range(BOXES)):
            for c in list(range(width // panel)):
                T.tma_copy(
                    source[
                        box_row(t0, g, b, H) : box_row(t0, g, b, H) + BOX,
                        box_head(g, b) * width + c * panel : box_head(g, b) * width + c * panel + panel,
                    ],
                    target[slot, b * BOX : b * BOX + BOX, c * panel : c * panel + panel],
                    barrier=full[slot],
                )

    @T.macro
    def products(Qs, Ks, IQs, IKs, S, X, v, tx):
        if PP:
            T.sync_threads(8 + tx // 128, 256)
        T.wgmma_gemm(Qs[v[1] % QS, :, :], Ks[v[0] % 2, :, :], S, transpose_B=True, clear_accum=True, policy=rows)
        if E:
            T.wgmma_gemm(IQs[v[1] % QS, :, :], IKs[v[0] % 2, :, :], X, transpose_B=True, clear_accum=True, policy=rows)

    @T.macro
    def softmax(S, X, m, n, w, l, y, ysum, c, scale, ready):
        T.call_extern(
            "handle", f"at_softmax<{BN}, {E}, {ready}>", S.access_ptr("rw"), X.access_ptr("rw"), m.access_ptr("r"),
            n.access_ptr("r"), w.access_ptr("r"), l.access_ptr("rw"), ysum.access_ptr("rw"), c.access_ptr("rw"), scale,
        )  # fmt: skip

    # O += P v of the tile before; then P of this one
    @T.macro
    def step(Qs, Ks, Vs, IQs, IKs, S, X, P, O, bars, v, sums, item, limits, KS, KE, tokens, scale, tx, masked):
        kfull, kempty, vfull, vempty = bars
        m, n, w, l, y, ysum, c, alpha = sums
        v[1] = T.call_extern("int32", "at_opaque", v[1])
        T.barrier_wait(kfull[v[0] % 2], v[0] // 2 % 2)
        products(Qs, Ks, IQs, IKs, S, X, v, tx)
        T.barrier_wait(vfull[(v[0] + 1) % 2], (v[0] - 1) // 2 % 2)
        T.wgmma_gemm(P, Vs[(v[0] + 1) % 2, :, :], O, policy=rows)
        if PP == 1:
            T.named_barrier_arrive(9 - tx // 128, 256)
        if masked:
            T.call_extern(
                "handle", f"at_limits<{HG}>", limits.access_ptr("w"), item, T.address_of(KS[0]), T.address_of(KE[0]),
                tokens,
            )  # fmt: skip
        T.wait_wgmma(2 if E else 1)
        if PP == 2:
            T.named_barrier_arrive(9 - tx // 128, 256)
        T.warpgroup_fence_operand(S, num_regs=BN // 2)
        if masked:
            T.call_extern(
                "handle", f"at_mask<{BN}>", S.access_ptr("rw"), m.access_ptr("rw"), limits.access_ptr("r"), item, v[2],
                scale,
            )  # fmt: skip
        v[3] = T.call_extern("int32", f"at_outgrown<{BN}>", S.access_ptr("r"), m.access_ptr("r"), scale)
        if v[3] != 0:
            T.call_extern(
                "handle", f"at_raise<{BN}, {E}>", S.access_ptr("r"), m.access_ptr("rw"), l.access_ptr("rw"),
                c.access_ptr("rw"), alpha.access_ptr("w"), scale,
            )  # fmt: skip
        if E:
            T.wait_wgmma(1)
            T.warpgroup_fence_operand(X, num_regs=BN // 2)
        if PP == 3:
            T.named_barrier_arrive(9 - tx // 128, 256)
        release(kempty, v[0] % 2, tx)
        if masked and E:
            T.call_extern(
                "handle", f"at_mask_index<{BN}>", X.access_ptr("rw"), n.access_ptr("rw"), w.access_ptr("r"),
                limits.access_ptr("r"), item, v[2],
            )  # fmt: skip
        softmax(S, X, m, n, w, l, y, ysum, c, scale, "true" if masked else "false")
        if E:
            T.call_extern(
                "handle", f"at_add<{BN}>", X.access_ptr("r"), n.access_ptr("rw"), l.access_ptr("r"), y.access_ptr("rw"),
                ysum.access_ptr("rw"), c.access_ptr("rw"),
            )  # fmt: skip
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=V // 2)
        release(vempty, (v[0] + 1) % 2, tx)
        v[0] = v[0] + 1
        if v[3] != 0:
            T.call_extern("handle", f"at_scale<{V}>", O.access_ptr("rw"), alpha.access_ptr("r"))
        T.call_extern("handle", f"at_pack<{BN}>", P.access_ptr("w"), S.access_ptr("r"))

    @T.macro
    def store_piece(Qs, OUT, slot, row, t0, g, panel, H, tokens):
        # row of the tile, first of PIECE; token-major: part of a token's heads, head-major: some tokens of one head
        if TOKEN_MAJOR:
            if t0 + row // HG < tokens:
                T.tma_copy(
                    Qs[slot, row : row + PIECE, panel * 64 : panel * 64 + 64],
                    OUT[
                        (t0 + row // HG) * H + g * HG + row % HG : (t0 + row // HG) * H + g * HG + row % HG + PIECE,
                        panel * 64 : panel * 64 + 64,
                    ],
                    leader_scope_threads=128,
                )
        else:
            if t0 + row % TOKENS < tokens:
                T.tma_copy(
                    Qs[slot, row : row + PIECE, panel * 64 : panel * 64 + 64],
                    OUT[
                        t0 + row % TOKENS : t0 + row % TOKENS + PIECE,
                        (g * HG + row // TOKENS) * V + panel * 64 : (g * HG + row // TOKENS) * V + panel * 64 + 64,
                    ],
                    leader_scope_threads=128,
                )

    @T.prim_func
    def flash_indexer_attention(
        Q: T.Tensor((nq, qd), "bfloat16"), K: T.Tensor((nk, kd), "bfloat16"), VAL: T.Tensor((nk, kv), "bfloat16"),
        IQ: T.Tensor((nq, qe), "bfloat16"), IK: T.Tensor((nk, max(E, 8)), "bfloat16"), W: T.Tensor((nx,), "float32"),
        KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((ni,), "int32"),
        OUT: T.Tensor((nq, qv), "bfloat16"), LSE: T.Tensor((nx,), "float32"), LSX: T.Tensor((nx,), "float32"),
        KL: T.Tensor((nx,), "float32"), H: T.int32, tokens: T.int32, nitems: T.int32, grid: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Qs = T.alloc_shared((QS, 128, D), "bfloat16")
            Ks = T.alloc_shared((2, BN, D), "bfloat16")
            Vs = T.alloc_shared((2, BN, V), "bfloat16")
            Is = T.alloc_shared((QS, 8), "int32")
            S = T.alloc_fragment((128, BN), "float32")
            P = T.alloc_fragment((128, BN), "bfloat16")
            O = T.alloc_fragment((128, V), "float32")
            if E:
                IQs = T.alloc_shared((QS, 128, E), "bfloat16")
                IKs = T.alloc_shared((2, BN, E), "bfloat16")
                X = T.alloc_fragment((128, BN), "float32")
            else:
                IQs, IKs, X = Qs, Ks, S
            qfull = T.alloc_barrier([1] * QS)
            qempty = T.alloc_barrier([2] * QS)
            kfull = T.alloc_barrier([1] * 2)
            kempty = T.alloc_barrier([2] * 2)
            vfull = T.alloc_barrier([1] * 2)
            vempty = T.alloc_barrier([2] * 2)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((4,), "int32")  # key tiles and items so far, masked tile, whether a row outgrew its shift
                limits = T.alloc_local((4,), "int32")
                m = T.alloc_local((2,), "float32")
                l = T.alloc_local((4,), "float32")
                alpha = T.alloc_local((2,), "float32")
                if E:
                    n = T.alloc_local((2,), "float32")
                    w = T.alloc_local((2,), "float32")
                    y = T.alloc_local((4,), "float32")
                    ysum = T.alloc_local((4,), "float32")
                    c = T.alloc_local((4,), "float32")
                else:
                    n, w, y, ysum, c = m, m, l, l, l
                bars = (kfull, kempty, vfull, vempty)
                sums = (m, n, w, l, y, ysum, c, alpha)
                items = T.alloc_var("int32")
                item = T.alloc_var("int32")
                v[0] = 0
                v[1] = 0
                if PP:
                    if tx >= 128:
                        T.named_barrier_arrive(8, 256)
                items = T.call_extern("int32", "at_count", nitems, bx, grid)
                for _ in T.serial(items):
                    item = T.call_extern("int32", "at_address", T.address_of(Is[0, 0])) + v[1] % QS * 32
                    T.barrier_wait(qfull[v[1] % QS], v[1] // QS % 2)
                    T.barrier_wait(kfull[v[0] % 2], v[0] // 2 % 2)
                    # tile 0: S, X and P
                    products(Qs, Ks, IQs, IKs, S, X, v, tx)
                    if PP:
                        T.named_barrier_arrive(9 - tx // 128, 256)
                    if TMA_STORE:
                        if v[1] > 0:  # the last item's outputs have left
                            if T.shuffle_elect(128):
                                T.tma_store_wait(0)
                                T.mbarrier_arrive(qempty[(v[1] + 1) % 2])
                    T.call_extern(
                        "handle", f"at_limits<{HG}>", limits.access_ptr("w"), item, T.address_of(KS[0]),
                        T.address_of(KE[0]), tokens,
                    )  # fmt: skip
                    if E:
                        T.call_extern("handle", f"at_weights<{HG}>", w.access_ptr("w"), item, T.address_of(W[0]), tokens, H)
                    for h in [0, 1]:
                        m[h] = 1.0e30
                        if E:
                            n[h] = 1.0e30
                    for i in [0, 1, 2, 3]:
                        l[i] = 0.0
                        if E:
                            c[i] = 0.0
                    T.clear(O)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(S, num_regs=BN // 2)
                    if E:
                        T.warpgroup_fence_operand(X, num_regs=BN // 2)
                    release(kempty, v[0] % 2, tx)
                    v[0] = v[0] + 1
                    T.call_extern(
                        "handle", f"at_mask<{BN}>", S.access_ptr("rw"), m.access_ptr("rw"), limits.access_ptr("r"),
                        item, 0, scale,
                    )  # fmt: skip
                    if E:
                        T.call_extern(
                            "handle", f"at_mask_index<{BN}>", X.access_ptr("rw"), n.access_ptr("rw"),
                            w.access_ptr("r"), limits.access_ptr("r"), item, 0,
                        )  # fmt: skip
                    softmax(S, X, m, n, w, l, y, ysum, c, scale, "true")
                    if E:
                        for i in [0, 1, 2, 3]:
                            y[i] = ysum[i]
                    T.call_extern("handle", f"at_pack<{BN}>", P.access_ptr("w"), S.access_ptr("r"))
                    v[2] = 1
                    for _ in T.serial(T.call_extern("int32", "at_masked", item)):
                        step(
                            Qs, Ks, Vs, IQs, IKs, S, X, P, O, bars, v, sums, item, limits, KS, KE, tokens, scale, tx, True
                        )
                        v[2] = v[2] + 1
                    for _ in T.serial(T.call_extern("int32", "at_whole", item)):
                        step(
                            Qs, Ks, Vs, IQs, IKs, S, X, P, O, bars, v, sums, item, limits, KS, KE, tokens, scale, tx, False
                        )
                    # O += P v of the last tile
                    T.barrier_wait(vfull[(v[0] + 1) % 2], (v[0] - 1) // 2 % 2)
                    T.wgmma_gemm(P, Vs[(v[0] + 1) % 2, :, :], O, policy=rows)
                    T.call_extern(
                        "handle", f"at_finish<{HG}, {E}>", alpha.access_ptr("w"), item, m.access_ptr("r"),
                        n.access_ptr("r"), l.access_ptr("r"), y.access_ptr("r"), c.access_ptr("r"),
                        T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(KL[0]), tokens, H,
                    )  # fmt: skip
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(O, num_regs=V // 2)
                    release(vempty, (v[0] + 1) % 2, tx)
                    T.call_extern("handle", f"at_scale<{V}>", O.access_ptr("rw"), alpha.access_ptr("r"))
                    if TMA_STORE:
                        t0 = T.call_extern("int32", "at_field", item, 0)
                        g = T.call_extern("int32", "at_field", item, 1)
                        T.copy(O, Qs[v[1] % QS, :, 0:V])
                        T.fence_proxy_async()
                        T.sync_threads(10 + tx // 128, 128)
                        for z in list(range(64 // PIECE)):
                            for p in list(range(V // 64)):
                                store_piece(Qs, OUT, v[1] % QS, tx // 128 * 64 + z * PIECE, t0, g, p, H, tokens)
                    else:
                        T.call_extern(
                            "handle", f"at_store<{HG}, {V}>", O.access_ptr("r"), item, T.address_of(OUT[0, 0]), tokens, H
                        )
                        T.sync_threads(10 + tx // 128, 128)
                        release(qempty, v[1] % QS, tx)
                    v[1] = v[1] + 1
                if TMA_STORE:
                    if T.shuffle_elect(128):
                        T.tma_store_wait(0)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    st = T.alloc_var("int32", 0)
                    ph = T.alloc_var("int32", 1)
                    qs = T.alloc_var("int32", 0)
                    qp = T.alloc_var("int32", 1)
                    key = T.alloc_var("int32")
                    g = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    tiles = T.alloc_var("int32")
                    last = T.alloc_var("int32")
                    at = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    slots = T.alloc_var("int32")
                    slots = T.call_extern("int32", "at_address", T.address_of(Is[0, 0]))
                    count = T.call_extern("int32", "at_count", nitems, bx, grid)
                    for it in T.serial(count):
                        at = bx + it * grid
                        t0 = T.call_extern("int32", "at_int", T.address_of(ITEMS[0]), at * 8)
                        g = T.call_extern("int32", "at_int", T.address_of(ITEMS[0]), at * 8 + 1)
                        tiles = T.call_extern("int32", "at_int", T.address_of(ITEMS[0]), at * 8 + 3)
                        T.barrier_wait(qempty[qs], qp)
                        T.call_extern("handle", "at_put", slots + qs * 32, T.address_of(ITEMS[0]), at)
                        load_rows(Q, Qs, qs, qfull, D, t0, g, H)
                        if E:
                            load_rows(IQ, IQs, qs, qfull, E, t0, g, H)
                        if T.shuffle_elect(32):
                            T.barrier_arrive(qfull[qs])
                        last = qs
                        qs = qs + 1
                        if qs == QS:
                            qs = 0
                            qp = qp ^ 1
                        for i in T.serial(tiles):
                            key = T.call_extern("int32", f"at_key<{BN}>", slots + last * 32, i)
                            T.barrier_wait(kempty[st], ph)
                            T.tma_copy(K[key : key + BN, g * D : g * D + D], Ks[st, :, :], barrier=kfull[st])
                            if E:
                                T.tma_copy(IK[key : key + BN, 0:E], IKs[st, :, :], barrier=kfull[st])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(kfull[st])
                            T.barrier_wait(vempty[st], ph)
                            T.tma_copy(VAL[key : key + BN, g * V : g * V + V], Vs[st, :, :], barrier=vfull[st])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(vfull[st])
                            st = st + 1
                            if st == 2:
                                st = 0
                                ph = ph ^ 1

    return flash_indexer_attention
