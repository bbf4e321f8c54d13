// KV caches made small for slow links: steps per channel, and for few bits a range coder (rANS).
// The format, and a reference that reads and writes it, are in kernels/kv_codec.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "motley.h"

namespace motley {
namespace {

constexpr int kLanes = 32, kClasses = 8, kSymbols = 64, kEscape = 63, kMiddle = 31;
constexpr int kBits = 11, kTotal = 1 << kBits;  // frequencies of a class add up to this
constexpr uint32_t kLeast = 1u << 15;           // a lane's state is in [kLeast, kLeast << 16)

struct Shape {
  int planes, tokens, channels;
  int64_t count() const { return int64_t(planes) * tokens * channels; }
};

// The upper half of a float, rounded to nearest.
uint16_t short_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_short(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What a channel's values are counted in: value ≈ middle + count · step.
struct Scale { std::vector<uint16_t> middle, step; };

struct Writer {
  uint8_t *at, *end;
  bool ok = true;
  void put(const void* data, int64_t bytes) {
    ok = ok && end - at >= bytes;
    if (ok) { std::memcpy(at, data, size_t(bytes)); at += bytes; }
  }
  template <class T> void put(const std::vector<T>& values) { put(values.data(), int64_t(values.size() * sizeof(T))); }
};

struct Reader {
  const uint8_t *at, *end;
  bool ok = true;
  void get(void* data, int64_t bytes) {
    ok = ok && bytes >= 0 && end - at >= bytes;
    if (ok) { std::memcpy(data, at, size_t(bytes)); at += bytes; }
  }
  template <class T> void get(std::vector<T>& values) { get(values.data(), int64_t(values.size() * sizeof(T))); }
};

// Rounds to nearest even; NaN is 0.
inline int16_t counted(float value, float limit) {
  if (!(value > -limit)) value = value < 0 ? -limit : 0;
  if (value > limit) value = limit;
  const float shifted = value + 12582912.0f;  // 1.5 · 2^23: its last bits are then the integer
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return int16_t(bits - 0x4b400000);
}

void count_plane(const float* in, const Shape& s, const Scale& scale, float limit, int16_t* out) {
  std::vector<float> middle(size_t(s.channels)), inverse(size_t(s.channels));
  for (int c = 0; c < s.channels; ++c) {
    const float step = from_short(scale.step[size_t(c)]);
    middle[size_t(c)] = from_short(scale.middle[size_t(c)]);
    inverse[size_t(c)] = step > 0 ? 1 / step : 0;
  }
  for (int t = 0; t < s.tokens; ++t)
    for (int c = 0; c < s.channels; ++c) {
      const int64_t i = int64_t(t) * s.channels + c;
      out[i] = counted((in[i] - middle[size_t(c)]) * inverse[size_t(c)], limit);
    }
}

// Even over the range of each channel, 254 steps.
Scale scale_by_range(const float* in, const Shape& s) {
  std::vector<float> low(in, in + s.channels), high = low;
  for (int t = 1; t < s.tokens; ++t)
    for (int c = 0; c < s.channels; ++c) {
      const float x = in[int64_t(t) * s.channels + c];
      low[size_t(c)] = std::min(low[size_t(c)], x);
      high[size_t(c)] = std::max(high[size_t(c)], x);
    }
  Scale scale;
  for (size_t c = 0; c < low.size(); ++c) {
    const uint16_t middle = short_of(0.5f * (low[c] + high[c]));
    const float m = from_short(middle), reach = std::max(high[c] - m, m - low[c]);
    scale.middle.push_back(middle);
    scale.step.push_back(short_of(reach / 126));  // a little room for the step's own rounding
  }
  return scale;
}

// `fineness` times the mean distance from the mean, which outliers do not stretch.
Scale scale_by_spread(const float* in, const Shape& s, float fineness) {
  std::vector<float> sum(size_t(s.channels)), spread(size_t(s.channels));
  for (int t = 0; t < s.tokens; ++t)
    for (int c = 0; c < s.channels; ++c) sum[size_t(c)] += in[int64_t(t) * s.channels + c];
  for (float& x : sum) x /= float(s.tokens);
  for (int t = 0; t < s.tokens; ++t)
    for (int c = 0; c < s.channels; ++c)
      spread[size_t(c)] += std::fabs(in[int64_t(t) * s.channels + c] - sum[size_t(c)]);
  Scale scale;
  for (size_t c = 0; c < sum.size(); ++c) {
    scale.middle.push_back(short_of(sum[c]));
    scale.step.push_back(short_of(fineness * spread[c] / float(s.tokens)));
  }
  return scale;
}

// Each channel as it is or as differences of neighbouring tokens, whichever is smaller, and its
// class by their mean: half an octave each.
void choose_ways(int16_t* counts, const Shape& s, uint8_t* ways) {
  std::vector<int64_t> plain(size_t(s.channels)), delta(size_t(s.channels));
  for (int t = 0; t < s.tokens; ++t)
    for (int c = 0; c < s.channels; ++c) {
      const int16_t* here = counts + int64_t(t) * s.channels + c;
      plain[size_t(c)] += std::abs(int(*here));
      delta[size_t(c)] += std::abs(int(*here) - (t ? int(here[-s.channels]) : 0));
    }
  for (int c = 0; c < s.channels; ++c) {
    const bool differ = delta[size_t(c)] < plain[size_t(c)];
    const double mean = double(differ ? delta[size_t(c)] : plain[size_t(c)]) / s.tokens;
    const int kind = int(std::floor(2 * std::log2(mean + 0.25))) + 3;
    ways[c] = uint8_t(std::clamp(kind, 0, kClasses - 1) << 1 | differ);
  }
  for (int t = s.tokens - 1; t > 0; --t)
    for (int c = 0; c < s.channels; ++c)
      if (ways[c] & 1) {
        int16_t* here = counts + int64_t(t) * s.channels + c;
        *here = int16_t(*here - here[-s.channels]);  // wraps, and is added up again likewise
      }
}

using Frequencies = uint16_t[kClasses][kSymbols];

// Scales counts of symbols so that each class adds up to kTotal and none that occurs is 0.
void normalise(const std::vector<int64_t>& histogram, Frequencies& frequencies) {
  for (int k = 0; k < kClasses; ++k) {
    const int64_t* counts = &histogram[size_t(k * kSymbols)];
    int64_t all = 0;
    for (int s = 0; s < kSymbols; ++s) all += counts[s];
    int left = kTotal;
    for (int s = 0; s < kSymbols; ++s) {
      frequencies[k][s] = counts[s] ? uint16_t(std::max<int64_t>(1, counts[s] * kTotal / all)) : 0;
      left -= frequencies[k][s];
    }
    while (left && all) {  // what rounding left over, or took too much, is the most frequent one's
      uint16_t* most = std::max_element(frequencies[k], frequencies[k] + kSymbols);
      const int change = left > 0 ? left : -std::min<int>(-left, *most / 2);
      *most = uint16_t(*most + change);
      left -= change;
    }
  }
}

void starts_of(const uint16_t* frequencies, uint32_t* starts) {
  uint32_t start = 0;
  for (int s = 0; s < kSymbols; ++s) { starts[s] = start; start += frequencies[s]; }
}

void encode_few_bits(const float* in, const Shape& s, const float* fineness, Writer& out) {
  const int64_t plane = int64_t(s.tokens) * s.channels;
  std::vector<int16_t> counts(size_t(s.count()));
  std::vector<uint8_t> ways(size_t(s.planes) * s.channels);
  for (int p = 0; p < s.planes; ++p) {
    const Scale scale = scale_by_spread(in + p * plane, s, fineness[p % 2]);
    count_plane(in + p * plane, s, scale, 8191, &counts[size_t(p * plane)]);
    choose_ways(&counts[size_t(p * plane)], s, &ways[size_t(p) * s.channels]);
    out.put(scale.middle);
    out.put(scale.step);
  }
  out.put(ways);
  std::vector<int64_t> histogram(kClasses * kSymbols);
  std::vector<int16_t> escapes;
  std::vector<uint8_t> symbols(counts.size());
  const auto each = [&](auto action) {  // action(index, class)
    int64_t i = 0;
    for (int p = 0; p < s.planes; ++p)
      for (int t = 0; t < s.tokens; ++t)
        for (int c = 0; c < s.channels; ++c, ++i) action(i, ways[size_t(p) * s.channels + c] >> 1);
  };
  each([&](int64_t i, int kind) {
    const int symbol = counts[size_t(i)] + kMiddle;
    const bool fits = symbol >= 0 && symbol < kEscape;
    if (!fits) escapes.push_back(counts[size_t(i)]);
    symbols[size_t(i)] = uint8_t(fits ? symbol : kEscape);
    ++histogram[size_t(kind * kSymbols + symbols[size_t(i)])];
  });
  Frequencies frequencies;
  normalise(histogram, frequencies);
  uint32_t starts[kClasses][kSymbols];
  for (int k = 0; k < kClasses; ++k) starts_of(frequencies[k], starts[k]);
  out.put(frequencies, sizeof frequencies);
  uint32_t states[kLanes];
  std::fill(states, states + kLanes, kLeast);
  std::vector<uint16_t> words(counts.size() + 1);  // a symbol costs one word at most
  uint16_t* word = words.data() + words.size();
  int64_t i = s.count();
  for (int p = s.planes; p-- > 0;)
    for (int t = s.tokens; t-- > 0;)
      for (int c = s.channels; c-- > 0;) {
        --i;
        const int kind = ways[size_t(p) * s.channels + c] >> 1, symbol = symbols[size_t(i)];
        const uint32_t frequency = frequencies[kind][symbol];
        uint32_t x = states[i % kLanes];
        if (x >= frequency << (31 - kBits)) { *--word = uint16_t(x); x >>= 16; }
        states[i % kLanes] = (x / frequency << kBits) + x % frequency + starts[kind][symbol];
      }
  const uint32_t sizes[] = {uint32_t(escapes.size()), uint32_t(words.data() + words.size() - word)};
  out.put(sizes, sizeof sizes);
  out.put(escapes);
  out.put(states, sizeof states);
  out.put(word, int64_t(sizes[1]) * 2);
}

struct Slot { uint16_t frequency, offset; uint8_t symbol; };

bool decode_few_bits(Reader& in, const Shape& s, float* out) {
  std::vector<Scale> scales(size_t(s.planes));
  for (Scale& scale : scales) {
    scale.middle.resize(size_t(s.channels));
    scale.step.resize(size_t(s.channels));
    in.get(scale.middle);
    in.get(scale.step);
  }
  std::vector<uint8_t> ways(size_t(s.planes) * s.channels);
  in.get(ways);
  Frequencies frequencies;
  in.get(frequencies, sizeof frequencies);
  uint32_t sizes[2] = {}, states[kLanes];
  in.get(sizes, sizeof sizes);
  if (!in.ok || sizes[0] > s.count() || sizes[1] > s.count()) return false;
  std::vector<int16_t> escapes(sizes[0]);
  std::vector<uint16_t> words(size_t(sizes[1]) + 1);
  in.get(escapes);
  in.get(states, sizeof states);
  in.get(words.data(), int64_t(sizes[1]) * 2);
  if (!in.ok) return false;
  std::vector<Slot> slots(kClasses * kTotal, Slot{1, 0, kMiddle});
  for (int k = 0; k < kClasses; ++k) {
    int at = 0;
    for (int symbol = 0; symbol < kSymbols; ++symbol)
      for (int i = 0; i < frequencies[k][symbol]; ++i, ++at) {
        if (at == kTotal) return false;
        slots[size_t(k * kTotal + at)] = {frequencies[k][symbol], uint16_t(i), uint8_t(symbol)};
      }
  }
  const uint16_t *word = words.data(), *last = words.data() + sizes[1];
  size_t escape = 0;
  std::vector<int16_t> row(size_t(s.channels));
  std::vector<float> middle(size_t(s.channels)), step(size_t(s.channels));
  std::vector<const Slot*> tables(size_t(s.channels));
  std::vector<int16_t> differ(size_t(s.channels));
  int64_t i = 0;
  for (int p = 0; p < s.planes; ++p) {
    for (int c = 0; c < s.channels; ++c) {
      const uint8_t way = ways[size_t(p) * s.channels + c];
      tables[size_t(c)] = &slots[size_t(way >> 1 & (kClasses - 1)) * kTotal];
      differ[size_t(c)] = int16_t(-(way & 1));
      middle[size_t(c)] = from_short(scales[size_t(p)].middle[size_t(c)]);
      step[size_t(c)] = from_short(scales[size_t(p)].step[size_t(c)]);
      row[size_t(c)] = 0;
    }
    for (int t = 0; t < s.tokens; ++t, out += s.channels) {
      for (int c = 0; c < s.channels; ++c, ++i) {
        uint32_t x = states[i % kLanes];
        const Slot slot = tables[size_t(c)][x & (kTotal - 1)];
        x = slot.frequency * (x >> kBits) + slot.offset;
        const bool refill = x < kLeast;
        const uint32_t refilled = x << 16 | *word;
        x = refill ? refilled : x;
        word += refill && word < last;
        states[i % kLanes] = x;
        int value = slot.symbol - kMiddle;
        if (slot.symbol == kEscape) {
          if (escape == escapes.size()) return false;
          value = escapes[escape++];
        }
        row[size_t(c)] = int16_t((row[size_t(c)] & differ[size_t(c)]) + value);
      }
      for (int c = 0; c < s.channels; ++c)
        out[c] = middle[size_t(c)] + float(row[size_t(c)]) * step[size_t(c)];
    }
  }
  return true;
}

void encode_bytes(const float* in, const Shape& s, Writer& out) {
  const int64_t plane = int64_t(s.tokens) * s.channels;
  std::vector<int16_t> counts(static_cast<size_t>(plane));
  std::vector<int8_t> bytes(static_cast<size_t>(plane));
  for (int p = 0; p < s.planes; ++p) {
    const Scale scale = scale_by_range(in + p * plane, s);
    count_plane(in + p * plane, s, scale, 127, counts.data());
    std::copy(counts.begin(), counts.end(), bytes.begin());
    out.put(scale.middle);
    out.put(scale.step);
    out.put(bytes);
  }
}

bool decode_bytes(Reader& in, const Shape& s, float* out) {
  Scale scale{std::vector<uint16_t>(size_t(s.channels)), std::vector<uint16_t>(size_t(s.channels))};
  std::vector<int8_t> row(size_t(s.channels));
  for (int p = 0; p < s.planes; ++p) {
    in.get(scale.middle);
    in.get(scale.step);
    for (int t = 0; t < s.tokens && in.ok; ++t, out += s.channels) {
      in.get(row);
      for (int c = 0; c < s.channels; ++c)
        out[c] = from_short(scale.middle[size_t(c)]) +
                 float(row[size_t(c)]) * from_short(scale.step[size_t(c)]);
    }
  }
  return in.ok;
}

}  // namespace
}  // namespace motley

using namespace motley;

int64_t motley_kv_encode(int32_t codec, const float* in, int32_t planes, int32_t tokens,
                         int32_t channels, const float* fineness, void* out, int64_t room) {
  auto* begin = static_cast<uint8_t*>(out);
  Writer writer{begin, begin + room};
  const Shape shape{planes, tokens, channels};
  if (codec == 8) encode_bytes(in, shape, writer);
  else encode_few_bits(in, shape, fineness, writer);
  return writer.ok ? writer.at - begin : -1;
}

int32_t motley_kv_decode(int32_t codec, const void* in, int64_t size, int32_t planes,
                         int32_t tokens, int32_t channels, float* out) {
  const auto* begin = static_cast<const uint8_t*>(in);
  Reader reader{begin, begin + size};
  const Shape shape{planes, tokens, channels};
  const bool whole = codec == 8 ? decode_bytes(reader, shape, out) : decode_few_bits(reader, shape, out);
  return whole && reader.at == reader.end;
}
