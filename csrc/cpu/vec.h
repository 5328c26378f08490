// Vec<A>: as many numbers of the accumulator type A (float or double) as one register of this
// instruction set holds, with what the algorithms need of it. Included inside the namespace of each
// ISA file, after <math.h>, <string.h> and, on x86, <immintrin.h>; it includes nothing itself.
//
// Storage types convert on load and store: float, double, bf16 and fp16. All stores round to
// nearest even.

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type in which a storage type is computed.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulator<T>::type;

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Ask for the cache line at `p`, which may lie past the end of anything: a hint does not fault.
static inline void prefetch(const void* p) { __builtin_prefetch(p); }

// ---- one number ----

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

static inline float widen(fp16 x) {
  // Shifted into a float's fields, the exponent is short by 127 - 15; the product repairs it, for
  // subnormals too. Infinities and NaN keep a full exponent.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  const uint32_t bits = special ? (magnitude | 0x7f800000u) : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | sign);
}

template <class T>
static inline T narrow(acc_t<T> x) {
  return x;
}

template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return bf16{uint16_t((bits >> 16) | 0x40)};
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline fp16 narrow<fp16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return fp16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000)
    return fp16{uint16_t(sign | 0x7c00)};  // 65520 and above round to inf
  if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves its bits at the end of the sum,
    // rounded.
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return fp16{uint16_t(sign | (bit_cast<uint32_t>(sum) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return fp16{uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

// Two neighbours along the sum of a dot product, as the bf16 instructions want them.
struct bf16_pair {
  bf16 part[2];
};

// ---- a register ----

template <class A>
struct Vec;

#if defined(FASTGPT_AVX512)

template <>
struct Vec<float> {
  static constexpr int width = 16;
  __m512 v;

  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(fp16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_fp16()); }
  // Around the caches; `p` is aligned to the bytes written.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void stream(fp16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_fp16()); }

  __m256i to_bf16() const {
#if defined(FASTGPT_AVX512_BF16)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }
  __m256i to_fp16() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  float reduce_max() const { return _mm512_reduce_max_ps(v); }
  float reduce_add() const { return _mm512_reduce_add_ps(v); }
};

static inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
static inline Vec<float> fms(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmsub_ps(a.v, b.v, c.v)};
}
static inline Vec<float> abs(Vec<float> a) { return {_mm512_abs_ps(a.v)}; }
static inline Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  // Bits of the second where the mask is 0, of the third where it is 1.
  const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(magnitude.v),
                                                        _mm512_castps_si512(sign.v), 0xac))};
}
// The second operand where either is NaN. `where_equal` is `yes` in the lanes where a == b, `where`
// in those whose byte at `p` is not 0.
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec<float> where_equal(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), no.v, yes.v)};
}
static inline Vec<float> where(const uint8_t* p, Vec<float> yes, Vec<float> no) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), no.v, yes.v)};
}
// `fill` in the lane of this number, if there is one.
static inline Vec<float> except_lane(Vec<float> a, int lane, float fill) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 mask = _mm512_cmpeq_epi32_mask(lanes, _mm512_set1_epi32(lane));
  return {_mm512_mask_mov_ps(a.v, mask, _mm512_set1_ps(fill))};
}
static inline Vec<float> round(Vec<float> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for a whole number n, right down into the subnormals.
static inline Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

template <>
struct Vec<double> {
  static constexpr int width = 8;
  __m512d v;

  static Vec all(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }

  double reduce_max() const { return _mm512_reduce_max_pd(v); }
  double reduce_add() const { return _mm512_reduce_add_pd(v); }
};

static inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm512_add_pd(a.v, b.v)};
}
static inline Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return {_mm512_sub_pd(a.v, b.v)};
}
static inline Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return {_mm512_mul_pd(a.v, b.v)};
}
static inline Vec<double> operator/(Vec<double> a, Vec<double> b) {
  return {_mm512_div_pd(a.v, b.v)};
}
static inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
static inline Vec<double> abs(Vec<double> a) { return {_mm512_abs_pd(a.v)}; }
static inline Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  const __m512i bit = _mm512_set1_epi64(int64_t(1) << 63);
  return {_mm512_castsi512_pd(_mm512_ternarylogic_epi64(bit, _mm512_castpd_si512(magnitude.v),
                                                        _mm512_castpd_si512(sign.v), 0xac))};
}
static inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
static inline Vec<double> where_equal(Vec<double> a, Vec<double> b, Vec<double> yes,
                                      Vec<double> no) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ), no.v, yes.v)};
}
static inline Vec<double> where(const uint8_t* p, Vec<double> yes, Vec<double> no) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm512_mask_blend_pd(__mmask8(_mm_test_epi8_mask(bytes, bytes)), no.v, yes.v)};
}
static inline Vec<double> except_lane(Vec<double> a, int lane, double fill) {
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __mmask8 mask = _mm512_cmpeq_epi64_mask(lanes, _mm512_set1_epi64(lane));
  return {_mm512_mask_mov_pd(a.v, mask, _mm512_set1_pd(fill))};
}
static inline Vec<double> round(Vec<double> a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec<double> scale_by_power(Vec<double> a, Vec<double> n) {
  return {_mm512_scalef_pd(a.v, n.v)};
}

// Rows to columns: first within 128-bit lanes, then among them.
static inline void transpose_lanes(__m512 (&x)[4]) {
  const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x88),
               b = _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
  const __m512 c = _mm512_shuffle_f32x4(x[2], x[3], 0x88),
               d = _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
  x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  x[1] = _mm512_shuffle_f32x4(b, d, 0x88);
  x[2] = _mm512_shuffle_f32x4(a, c, 0xdd);
  x[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}
static inline void transpose(Vec<float> (&x)[16]) {
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[i].v, x[i + 1].v));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[i].v, x[i + 1].v));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2].v, x[i + 3].v));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2].v, x[i + 3].v));
    x[i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    x[i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    x[i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    x[i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    __m512 lanes[4] = {x[i].v, x[4 + i].v, x[8 + i].v, x[12 + i].v};
    transpose_lanes(lanes);
    for (int j = 0; j < 4; ++j) x[4 * j + i].v = lanes[j];
  }
}
static inline void transpose(Vec<double> (&x)[8]) {
  __m512 even[4], odd[4];
  for (int i = 0; i < 4; ++i) {
    even[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x[2 * i].v, x[2 * i + 1].v));
    odd[i] = _mm512_castpd_ps(_mm512_unpackhi_pd(x[2 * i].v, x[2 * i + 1].v));
  }
  transpose_lanes(even);
  transpose_lanes(odd);
  for (int i = 0; i < 4; ++i) {
    x[2 * i].v = _mm512_castps_pd(even[i]);
    x[2 * i + 1].v = _mm512_castps_pd(odd[i]);
  }
}

static inline void stream_fence() { _mm_sfence(); }

#elif defined(FASTGPT_AVX2)

template <>
struct Vec<float> {
  static constexpr int width = 8;
  __m256 v;

  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const fp16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(fp16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_fp16()); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void stream(fp16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_fp16()); }

  __m128i to_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i high =
        _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                               _mm256_castsi256_ps(quiet), nan)),
                          16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  __m128i to_fp16() const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  float reduce_max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  float reduce_add() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
};

static inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline Vec<float> fms(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmsub_ps(a.v, b.v, c.v)};
}
static inline Vec<float> abs(Vec<float> a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
static inline Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  return {_mm256_or_ps(abs(magnitude).v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))};
}
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec<float> where_equal(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
static inline Vec<float> where(const uint8_t* p, Vec<float> yes, Vec<float> no) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m256i zero = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
  return {_mm256_blendv_ps(yes.v, no.v, _mm256_castsi256_ps(zero))};
}
static inline Vec<float> except_lane(Vec<float> a, int lane, float fill) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(lane));
  return {_mm256_blendv_ps(a.v, _mm256_set1_ps(fill), _mm256_castsi256_ps(mask))};
}
static inline Vec<float> round(Vec<float> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  // In two factors, so that each is a normal number where the product need not be.
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const auto power = [&](__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, bias), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}

template <>
struct Vec<double> {
  static constexpr int width = 4;
  __m256d v;

  static Vec all(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }

  double reduce_max() const {
    const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
  }
  double reduce_add() const {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
};

static inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm256_add_pd(a.v, b.v)};
}
static inline Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return {_mm256_sub_pd(a.v, b.v)};
}
static inline Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return {_mm256_mul_pd(a.v, b.v)};
}
static inline Vec<double> operator/(Vec<double> a, Vec<double> b) {
  return {_mm256_div_pd(a.v, b.v)};
}
static inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
static inline Vec<double> abs(Vec<double> a) {
  return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)};
}
static inline Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return {_mm256_or_pd(abs(magnitude).v, _mm256_and_pd(_mm256_set1_pd(-0.0), sign.v))};
}
static inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
static inline Vec<double> where_equal(Vec<double> a, Vec<double> b, Vec<double> yes,
                                      Vec<double> no) {
  return {_mm256_blendv_pd(no.v, yes.v, _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ))};
}
static inline Vec<double> where(const uint8_t* p, Vec<double> yes, Vec<double> no) {
  int32_t four;
  memcpy(&four, p, sizeof(four));
  const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256i zero = _mm256_cmpeq_epi64(wide, _mm256_setzero_si256());
  return {_mm256_blendv_pd(yes.v, no.v, _mm256_castsi256_pd(zero))};
}
static inline Vec<double> except_lane(Vec<double> a, int lane, double fill) {
  const __m256i mask = _mm256_cmpeq_epi64(_mm256_setr_epi64x(0, 1, 2, 3), _mm256_set1_epi64x(lane));
  return {_mm256_blendv_pd(a.v, _mm256_set1_pd(fill), _mm256_castsi256_pd(mask))};
}
static inline Vec<double> round(Vec<double> a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec<double> scale_by_power(Vec<double> a, Vec<double> n) {
  const __m128i whole = _mm256_cvtpd_epi32(n.v);
  const __m128i half = _mm_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi64x(1023);
  const auto power = [&](__m128i k) {
    return _mm256_castsi256_pd(
        _mm256_slli_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(k), bias), 52));
  };
  return {_mm256_mul_pd(_mm256_mul_pd(a.v, power(half)), power(_mm_sub_epi32(whole, half)))};
}

// Rows to columns: first within 128-bit lanes, then among them.
static inline void transpose(Vec<float> (&x)[8]) {
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[i].v, x[i + 1].v));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(x[i].v, x[i + 1].v));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[i + 2].v, x[i + 3].v));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(x[i + 2].v, x[i + 3].v));
    x[i].v = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    x[i + 1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    x[i + 2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    x[i + 3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 first = x[i].v, second = x[4 + i].v;
    x[i].v = _mm256_permute2f128_ps(first, second, 0x20);
    x[4 + i].v = _mm256_permute2f128_ps(first, second, 0x31);
  }
}
static inline void transpose(Vec<double> (&x)[4]) {
  const __m256d a = _mm256_unpacklo_pd(x[0].v, x[1].v), b = _mm256_unpackhi_pd(x[0].v, x[1].v);
  const __m256d c = _mm256_unpacklo_pd(x[2].v, x[3].v), d = _mm256_unpackhi_pd(x[2].v, x[3].v);
  x[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  x[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  x[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  x[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}

static inline void stream_fence() { _mm_sfence(); }

#else  // portable

template <class A>
struct Vec {
  static constexpr int width = 1;
  A v;

  static Vec all(A x) { return {x}; }
  template <class T>
  static Vec load(const T* p) {
    return {widen(*p)};
  }
  template <class T>
  void store(T* p) const {
    *p = narrow<T>(v);
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Vec abs(Vec a) { return {A(fabs(a.v))}; }
  friend Vec copysign(Vec a, Vec b) { return {A(::copysign(a.v, b.v))}; }
  // Two roundings: a library call for the one of a true fma would cost more than it is worth here.
  friend Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  // One rounding, where that is what it is for; of float in double.
  friend Vec fms(Vec a, Vec b, Vec c) { return {A(double(a.v) * double(b.v) - double(c.v))}; }
  friend Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vec where_equal(Vec a, Vec b, Vec yes, Vec no) { return a.v == b.v ? yes : no; }
  friend Vec except_lane(Vec a, int lane, A fill) { return lane == 0 ? Vec{fill} : a; }
  friend Vec where(const uint8_t* p, Vec yes, Vec no) { return *p ? yes : no; }
  // To even by the constant that pushes the fraction out of the significand; |a| is small here.
  friend Vec round(Vec a) {
    constexpr A shift = sizeof(A) == 4 ? A(0x1.8p23) : A(0x1.8p52);
    volatile A shifted = a.v + shift;
    return {shifted - shift};
  }
  friend Vec scale_by_power(Vec a, Vec n) { return {A(ldexp(double(a.v), int(n.v)))}; }
  A reduce_max() const { return v; }
  A reduce_add() const { return v; }
};

template <class A>
static inline void transpose(Vec<A> (&)[1]) {}

static inline void stream_fence() {}

#endif

// ---- for every instruction set ----

// Operands of a sum of products (gemm.h): a register of them, and what a matrix of T is stored as
// there. One operand holds `terms` numbers along the sum.
template <class E>
struct Operand {
  static constexpr int terms = 1;
  using Register = Vec<E>;
  static Register load(const E* p) { return Register::load(p); }
  static Register all(E x) { return Register::all(x); }
};
static inline float term(float x, int) { return x; }
static inline double term(double x, int) { return x; }

template <class T>
struct operand {
  using type = acc_t<T>;
};
template <class T>
using operand_t = typename operand<T>::type;

#if defined(FASTGPT_AVX512_BF16)
template <>
struct Operand<bf16_pair> {
  static constexpr int terms = 2;
  struct Register {
    __m512i v;
  };
  static Register load(const bf16_pair* p) { return {_mm512_loadu_si512(p)}; }
  static Register all(bf16_pair x) { return {_mm512_set1_epi32(bit_cast<int32_t>(x))}; }
};
static inline float term(bf16_pair x, int i) { return widen(x.part[i]); }

template <>
struct operand<bf16> {
  using type = bf16_pair;
};

// c + the sum over both parts of a * b. Products and sum are in float; subnormals count as zero.
static inline Vec<float> fma(Operand<bf16_pair>::Register a, Operand<bf16_pair>::Register b,
                             Vec<float> c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}

static inline void store_pairs(Vec<float> first, Vec<float> second, bf16_pair* p) {
  const __m512i low = _mm512_cvtepu16_epi32(first.to_bf16());
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second.to_bf16()), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
}
#endif

// `x` in the first `n` lanes, 0 behind them.
template <class A>
static inline Vec<A> first_lanes(A x, int n) {
  A lanes[Vec<A>::width];
  for (int i = 0; i < Vec<A>::width; ++i) lanes[i] = i < n ? x : A(0);
  return Vec<A>::load(lanes);
}

// The first `n` numbers at `p`, and `fill` in the lanes behind them.
template <class A, class T>
static inline Vec<A> load_partial(const T* p, int n, A fill) {
  A lanes[Vec<A>::width];
  for (int i = 0; i < Vec<A>::width; ++i) lanes[i] = i < n ? widen(p[i]) : fill;
  return Vec<A>::load(lanes);
}

#if defined(FASTGPT_AVX512)
static inline Vec<float> first_lanes(float x, int n) {
  return {_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), _mm512_set1_ps(x))};
}
static inline Vec<double> first_lanes(double x, int n) {
  return {_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), _mm512_set1_pd(x))};
}
static inline Vec<float> load_partial(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p)};
}
static inline Vec<double> load_partial(const double* p, int n, double fill) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), __mmask8((1u << n) - 1), p)};
}
static inline Vec<float> load_partial(const bf16* p, int n, float fill) {
  const __mmask16 mask = __mmask16((1u << n) - 1);
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, x)};
}
static inline Vec<float> load_partial(const fp16* p, int n, float fill) {
  const __mmask16 mask = __mmask16((1u << n) - 1);
  const __m512 x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, x)};
}
static inline void store_partial(Vec<float> x, float* p, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x.v);
}
static inline void store_partial(Vec<double> x, double* p, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), x.v);
}
static inline void store_partial(Vec<float> x, bf16* p, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), x.to_bf16());
}
static inline void store_partial(Vec<float> x, fp16* p, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), x.to_fp16());
}
#endif

template <class A, class T>
static inline void store_partial(Vec<A> x, T* p, int n) {
  A lanes[Vec<A>::width];
  x.store(lanes);
  for (int i = 0; i < n; ++i) p[i] = narrow<T>(lanes[i]);
}

// The sum without its first term of e^r on |r| <= ln(2) / 2: in float by the polynomial of degree 6
// of least largest relative error whose last two coefficients are 1 (4e-9, under a tenth of half an
// ulp; benchmarks/NOTES.md), in double by its Taylor series. The first term that leaves out is
// 0.35^14 / 14! = 5e-18.
static inline Vec<float> expm1_reduced(Vec<float> r) {
  Vec<float> s = Vec<float>::all(0.00138145837f);
  s = fma(s, r, Vec<float>::all(0.00836872403f));
  s = fma(s, r, Vec<float>::all(0.041668389f));
  s = fma(s, r, Vec<float>::all(0.166665211f));
  s = fma(s, r, Vec<float>::all(0.49999994f));
  s = fma(s, r, Vec<float>::all(1.0f));
  return s * r;
}

static inline Vec<double> expm1_over(Vec<double> r) {
  Vec<double> s = Vec<double>::all(1.0 / 6227020800.0);  // 1 / 13!
  const double inverse_factorial[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                      1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                      1.0 / 24,        1.0 / 6,        0.5,           1.0};
  for (double c : inverse_factorial) s = fma(s, r, Vec<double>::all(c));
  return s;
}
static inline Vec<double> expm1_reduced(Vec<double> r) { return expm1_over(r) * r; }
static inline Vec<double> exp_reduced(Vec<double> r) {
  return fma(expm1_over(r), r, Vec<double>::all(1.0));
}

// x = n ln 2 + r with ln 2 in two pieces, of which the first times n is exact (Cody and Waite,
// Software Manual for the Elementary Functions, 1980). x is clamped so that n is in range: e^x is 0
// below in either type.
template <class A>
struct Reduced {
  Vec<A> n, r;
};

static inline Reduced<float> reduce(Vec<float> x) {
  x = max(Vec<float>::all(-105.0f), x);
  const Vec<float> n = round(x * Vec<float>::all(1.44269504f));
  Vec<float> r = fma(n, Vec<float>::all(-0x1.62e4p-1f), x);
  return {n, fma(n, Vec<float>::all(-0x1.7f7d1cp-20f), r)};
}

static inline Reduced<double> reduce(Vec<double> x) {
  x = max(Vec<double>::all(-746.0), x);
  const Vec<double> n = round(x * Vec<double>::all(1.4426950408889634));
  Vec<double> r = fma(n, Vec<double>::all(-0x1.62e42feep-1), x);
  return {n, fma(n, Vec<double>::all(-0x1.a39ef35793c76p-33), r)};
}

// e^x for x <= 0 and e^x - 1, each to about an ulp of itself.
template <class A>
struct Exponential {
  Vec<A> value, minus_one;
};

template <class A>
static inline Exponential<A> exponential(Vec<A> x) {
  const Reduced<A> reduced = reduce(x);
  const Vec<A> m = expm1_reduced(reduced.r);
  const Vec<A> power = scale_by_power(Vec<A>::all(1), reduced.n);
  return {fma(power, m, power), fma(power, m, power - Vec<A>::all(1))};
}

// 2^r on |r| <= 1/2, or on [0, 1): polynomials of degree 6 of least largest relative error with the
// last coefficient 1, 3e-9 and 2e-9.
static constexpr float kExp2[] = {0.000153264729f,
                                  0.00133908063f,
                                  0.00961850584f,
                                  0.0555035993f,
                                  0.240226477f,
                                  0.693147182f,
                                  1.0f};
static inline Vec<float> exp2_reduced(Vec<float> r) {
  Vec<float> s = Vec<float>::all(kExp2[0]);
  for (int i = 1; i < 7; ++i) s = fma(s, r, Vec<float>::all(kExp2[i]));
  return s;
}

static inline Vec<float> exp2_fraction(Vec<float> r) {
  const float coefficients[] = {0.001248229f, 0.009673775f, 0.055486184f,
                                0.24022909f,  0.69314706f,  1.0f};
  Vec<float> s = Vec<float>::all(0.00021565972f);
  for (float c : coefficients) s = fma(s, r, Vec<float>::all(c));
  return s;
}

#if defined(FASTGPT_AVX512)
// 2^x = 2^fraction 2^floor, which the instruction takes of x itself. That of -inf is 2^0 2^-inf.
static inline Vec<float> exp2_to_the(Vec<float> x) {
  const Vec<float> fraction{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return scale_by_power(exp2_fraction(fraction), x);
}
#else
static inline Vec<float> exp2_to_the(Vec<float> x) {
  x = max(Vec<float>::all(-151.0f), x);
  const Vec<float> n = round(x);
  return scale_by_power(exp2_reduced(x - n), n);
}
#endif

// e^x for x <= 1, -inf and NaN included, for a difference of logits of the type T. That of float
// logits must have its last bits however far below 0 it is: x log2(e) is rounded to find the power
// of 2 only, and what is left over is formed by multiply-adds, of log2(e) in two pieces.
template <class T>
struct ExpOf {
  static Vec<float> of(Vec<float> x) {
    const Vec<float> log2e = Vec<float>::all(1.44269504f);
    x = max(Vec<float>::all(-105.0f), x);
    const Vec<float> n = round(x * log2e);
    const Vec<float> r = fma(x, Vec<float>::all(1.92596303e-8f), fms(x, log2e, n));
    return scale_by_power(exp2_reduced(r), n);
  }
};

template <>
struct ExpOf<double> {
  static Vec<double> of(Vec<double> x) {
    const Reduced<double> reduced = reduce(x);
    return scale_by_power(exp_reduced(reduced.r), reduced.n);
  }
};

// 16-bit logits: the rounding of x log2(e), a millionth of e^-20, is lost in theirs.
struct ExpOfHalf {
  static Vec<float> of(Vec<float> x) { return exp2_to_the(x * Vec<float>::all(1.44269504f)); }
};
template <>
struct ExpOf<bf16> : ExpOfHalf {};
template <>
struct ExpOf<fp16> : ExpOfHalf {};

// 2^x likewise, for x <= 0 and what rounding lets a little above, of several registers in step: the
// chain of one is longer than a processor looks ahead.
template <int kCount>
static inline void exp2(Vec<float> (&x)[kCount]) {
  using V = Vec<float>;
  V n[kCount], s[kCount];
  for (V& v : x) v = max(V::all(-151.0f), v);
  for (int i = 0; i < kCount; ++i) n[i] = round(x[i]);
  for (int i = 0; i < kCount; ++i) x[i] = x[i] - n[i];  // exact
  for (V& v : s) v = V::all(kExp2[0]);
  for (int c = 1; c < 7; ++c) {
    for (int i = 0; i < kCount; ++i) s[i] = fma(s[i], x[i], V::all(kExp2[c]));
  }
  for (int i = 0; i < kCount; ++i) x[i] = scale_by_power(s[i], n[i]);
}

template <int kCount>
static inline void exp2(Vec<double> (&x)[kCount]) {
  using V = Vec<double>;
  for (V& v : x) {
    v = max(V::all(-1076.0), v);
    const V n = round(v);
    v = scale_by_power(exp_reduced((v - n) * V::all(0.6931471805599453)), n);
  }
}

// y = k tanh(x / k) and dy/dx.
template <class A>
struct Capped {
  Vec<A> y, slope;
};

template <class A>
struct Cap {
  A k;

  Capped<A> operator()(Vec<A> x) const {
    using V = Vec<A>;
    const V two = V::all(2);
    // e = exp(-2 |x / k|) and e - 1, each to its own last bits: near 0 and far from it nothing
    // cancels, neither in tanh = (1 - e) / (1 + e) nor in its slope 4 e / (1 + e)^2.
    const Exponential<A> e = exponential(V::all(-2) * abs(x / V::all(k)));
    const V above = two + e.minus_one;  // 1 + e
    const V tanh = (V::all(0) - e.minus_one) / above;
    return {V::all(k) * copysign(tanh, x), V::all(4) * e.value / (above * above)};
  }
};
