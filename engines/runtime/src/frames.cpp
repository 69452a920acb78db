#include "frames.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace glip {
namespace {

constexpr std::int64_t kMaxNetworkPixels = 64'000'000, kMaxPixels = 178'956'970;
constexpr int kDivisor = 32;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::frame, message); }

int ceil_to(int value) { return (value + kDivisor - 1) / kDivisor * kDivisor; }

int bytes_of(PixelFormat format) {
  switch (format) {
    case PixelFormat::bgr:
    case PixelFormat::rgb:
      return 3;
    case PixelFormat::bgra:
    case PixelFormat::rgba:
      return 4;
    case PixelFormat::gray:
    case PixelFormat::nv12:
      return 1;
  }
  refuse("picture has format " + std::to_string(static_cast<int>(format)) + "; legal are those of PixelFormat");
}

void check(const ImageView& image, bool cuda) {
  if (image.memory == Memory::cuda) {
    if (!cuda) {
      refuse("the picture is in GPU memory, which this backend cannot read; copy it to the host, or use backend tensorrt");
    }
    if (image.format == PixelFormat::gray) {
      refuse(
          "the picture in GPU memory is gray; legal there are BGR, RGB, BGRA, RGBA and NV12: convert it, or copy it to the"
          " host");
    }
  } else if (image.memory != Memory::host) {
    refuse("picture has an unknown kind of memory; legal are those of Memory");
  }
  const std::string size = "picture is " + std::to_string(image.width) + "x" + std::to_string(image.height);
  if (image.width < 1 || image.height < 1) refuse(size + ": both sides must be at least 1 pixel");
  if (static_cast<std::int64_t>(image.width) * image.height > kMaxPixels) {
    refuse(size + ", more than the " + std::to_string(kMaxPixels) + " pixels accepted; shrink it or cut it into tiles");
  }
  if (!image.data) refuse("picture has no data: its pointer is null");
  const std::size_t row = static_cast<std::size_t>(image.width) * static_cast<std::size_t>(bytes_of(image.format));
  if (image.pitch != 0 && image.pitch < row) {
    refuse("picture has a pitch of " + std::to_string(image.pitch) + " bytes; a row of " + std::to_string(image.width) +
           " pixels has " + std::to_string(row) + ", and 0 means that rows follow without a gap");
  }
  // Beyond this no pointer reaches the last row; a negative number, for rows from the bottom up, arrives so.
  const auto most = static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max() / image.height);
  const std::size_t widest = std::max(image.pitch, image.format == PixelFormat::nv12 ? image.chroma_pitch : 0);
  if (widest > most) {
    refuse("picture has a pitch of " + std::to_string(widest) +
           " bytes, which no memory holds; rows are given from the"
           " top down, with a positive pitch");
  }
  if (image.format == PixelFormat::nv12) {
    if (image.width % 2 || image.height % 2) refuse(size + "; both sides of an NV12 picture are even");
    if (image.chroma_pitch != 0 && image.chroma_pitch < row) {
      refuse("picture has a chroma pitch of " + std::to_string(image.chroma_pitch) + " bytes; a row has " +
             std::to_string(row));
    }
  }
}

/// What remains of an integer with 20 bits behind the point.
std::uint8_t clip(std::int32_t value) { return static_cast<std::uint8_t>(std::clamp(value >> 20, 0, 255)); }

/// NV12 to BGR as Python's nv12_to_rgb and OpenCV: BT.601 of limited range, each color for its two by two pixels.
std::vector<std::uint8_t> from_nv12(const ImageView& image, std::size_t pitch) {
  const auto* luma = static_cast<const std::uint8_t*>(image.data);
  const auto* chroma =
      image.chroma ? static_cast<const std::uint8_t*>(image.chroma) : luma + pitch * static_cast<std::size_t>(image.height);
  const std::size_t chroma_pitch = image.chroma_pitch ? image.chroma_pitch : pitch;
  const auto width = static_cast<std::size_t>(image.width), height = static_cast<std::size_t>(image.height);
  std::vector<std::uint8_t> out(width * height * 3);
  for (std::size_t y = 0; y < height; ++y) {
    for (std::size_t x = 0; x < width; ++x) {
      const std::int32_t light = std::max(luma[y * pitch + x] - 16, 0) * 1220542 + (1 << 19);
      const std::int32_t u = chroma[y / 2 * chroma_pitch + x / 2 * 2] - 128;
      const std::int32_t v = chroma[y / 2 * chroma_pitch + x / 2 * 2 + 1] - 128;
      std::uint8_t* pixel = &out[(y * width + x) * 3];
      pixel[0] = clip(light + 2116026 * u);
      pixel[1] = clip(light - 409993 * u - 852492 * v);
      pixel[2] = clip(light + 1673527 * v);
    }
  }
  return out;
}

/// Weights of the filter for one axis, in fixed point with 22 bits behind the point.
struct Weights {
  std::vector<int> first, count;
  std::vector<std::int32_t> values;
  std::size_t stride = 0;
};

constexpr int kBits = 32 - 8 - 2;

Weights weights_of(int from, int to) {
  const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0), support = stretch;
  Weights out;
  out.stride = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
  out.values.assign(out.stride * static_cast<std::size_t>(to), 0);
  std::vector<double> row(out.stride);
  // Half is added and the rest cut off because Pillow does that; std::lround rounds some values in another way.
  // NOLINTBEGIN(bugprone-incorrect-roundings)
  for (int i = 0; i < to; ++i) {
    const double center = (i + 0.5) * scale, inverse = 1.0 / stretch;
    const int first = std::max(0, static_cast<int>(center - support + 0.5));
    const int count = std::min(from, static_cast<int>(center + support + 0.5)) - first;
    double sum = 0;
    for (int k = 0; k < count; ++k) {
      const double distance = std::abs((k + first - center + 0.5) * inverse);
      row[static_cast<std::size_t>(k)] = distance < 1.0 ? 1.0 - distance : 0.0;
      sum += row[static_cast<std::size_t>(k)];
    }
    for (int k = 0; k < count; ++k) {
      const double weight = sum != 0 ? row[static_cast<std::size_t>(k)] / sum : row[static_cast<std::size_t>(k)];
      out.values[static_cast<std::size_t>(i) * out.stride + static_cast<std::size_t>(k)] =
          static_cast<std::int32_t>(0.5 + weight * (1 << kBits));
    }
    out.first.push_back(first);
    out.count.push_back(count);
  }
  // NOLINTEND(bugprone-incorrect-roundings)
  return out;
}

std::uint8_t rounded(std::int32_t sum) { return static_cast<std::uint8_t>(std::min(255, std::max(0, sum >> kBits))); }

/// Resize every row to a new width; where the width stays, the pixels are copied.
void resize_width(const std::uint8_t* source, Size from, std::size_t pitch, int step, const int (&order)[3],
                  std::uint8_t* target, int to, std::size_t target_pitch) {
  const Weights weights = weights_of(from.width, to);
  for (int y = 0; y < from.height; ++y) {
    const std::uint8_t* line = source + static_cast<std::size_t>(y) * pitch;
    std::uint8_t* out = target + static_cast<std::size_t>(y) * target_pitch;
    for (int x = 0; x < to; ++x, out += 3) {
      if (to == from.width) {
        for (int c = 0; c < 3; ++c) out[c] = line[x * step + order[c]];
        continue;
      }
      const auto at = static_cast<std::size_t>(x);
      const std::int32_t* weight = &weights.values[at * weights.stride];
      const std::uint8_t* pixel = line + static_cast<std::ptrdiff_t>(weights.first[at]) * step;
      std::int32_t sums[3] = {1 << (kBits - 1), 1 << (kBits - 1), 1 << (kBits - 1)};
      for (int k = 0; k < weights.count[at]; ++k, pixel += step) {
        for (int c = 0; c < 3; ++c) sums[c] += pixel[order[c]] * weight[k];
      }
      for (int c = 0; c < 3; ++c) out[c] = rounded(sums[c]);
    }
  }
}

/// Resize every column to a new height; three bytes a pixel.
void resize_height(const std::uint8_t* source, Size from, std::size_t pitch, std::uint8_t* target, int to,
                   std::size_t target_pitch) {
  const Weights weights = weights_of(from.height, to);
  const auto width = static_cast<std::size_t>(from.width) * 3;
  std::vector<std::int32_t> sums(width);
  for (int y = 0; y < to; ++y) {
    std::uint8_t* out = target + static_cast<std::size_t>(y) * target_pitch;
    const auto at = static_cast<std::size_t>(y);
    if (to == from.height) {
      std::copy_n(source + at * pitch, width, out);
      continue;
    }
    std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
    for (int k = 0; k < weights.count[at]; ++k) {
      const std::uint8_t* line = source + static_cast<std::size_t>(weights.first[at] + k) * pitch;
      const std::int32_t weight = weights.values[at * weights.stride + static_cast<std::size_t>(k)];
      for (std::size_t x = 0; x < width; ++x) sums[x] += line[x] * weight;
    }
    for (std::size_t x = 0; x < width; ++x) out[x] = rounded(sums[x]);
  }
}

}  // namespace

Size network_size(int height, int width, int shortest_side, int longest_side) {
  const double low = std::min(height, width), high = std::max(height, width);
  std::int64_t short_side = shortest_side, long_side = -1;
  if (longest_side > 0 && high / low * shortest_side > longest_side) {
    short_side = static_cast<std::int64_t>(std::nearbyint(longest_side * low / high));  // ties to even, as in Python
    if (short_side == 0) {
      short_side = 1;
      long_side = longest_side;
    }
  }
  if (long_side < 0) long_side = static_cast<std::int64_t>(static_cast<double>(short_side) * high / low);
  if (long_side > kMaxNetworkPixels || short_side * long_side > kMaxNetworkPixels) {
    refuse("a " + std::to_string(width) + "x" + std::to_string(height) + " picture resized to a shortest side of " +
           std::to_string(shortest_side) + " has more than " + std::to_string(kMaxNetworkPixels) +
           " pixels; set a longest side (official: 1333) or crop the picture");
  }
  const int a = static_cast<int>(short_side), b = static_cast<int>(long_side);
  return height <= width ? Size{a, b} : Size{b, a};
}

void resize(const std::uint8_t* source, Size from, std::size_t pitch, int step, const int (&order)[3], std::uint8_t* target,
            Size to, std::size_t target_pitch) {
  static constexpr int kInOrder[3] = {0, 1, 2};
  // Which axis comes first decides the last bit. The rule is Pillow 13's, found by comparing results; before, width was
  // always first.
  const bool height_first = to.height < from.height && from.height - to.height > 2 * (from.width - to.width);
  const Size between = height_first ? Size{to.height, from.width} : Size{from.height, to.width};
  const auto row = static_cast<std::size_t>(between.width) * 3;
  std::vector<std::uint8_t> rows(static_cast<std::size_t>(between.height) * row);
  if (height_first) {
    std::vector<std::uint8_t> packed(static_cast<std::size_t>(from.height) * row);
    resize_width(source, from, pitch, step, order, packed.data(), from.width, row);
    resize_height(packed.data(), from, row, rows.data(), to.height, row);
    resize_width(rows.data(), between, row, 3, kInOrder, target, to.width, target_pitch);
  } else {
    resize_width(source, from, pitch, step, order, rows.data(), to.width, row);
    resize_height(rows.data(), between, row, target, to.height, target_pitch);
  }
}

namespace {

/// Resize one picture to its place on the canvas.
void place(const ImageView& image, Size to, std::uint8_t* target, std::size_t target_pitch) {
  int step = bytes_of(image.format);
  std::size_t pitch = image.pitch ? image.pitch : static_cast<std::size_t>(image.width) * static_cast<std::size_t>(step);
  const auto* source = static_cast<const std::uint8_t*>(image.data);
  std::vector<std::uint8_t> converted;
  int order[3] = {0, 1, 2};
  if (image.format == PixelFormat::rgb || image.format == PixelFormat::rgba) std::swap(order[0], order[2]);
  if (image.format == PixelFormat::gray) std::fill(order, order + 3, 0);
  if (image.format == PixelFormat::nv12) {
    converted = from_nv12(image, pitch);
    source = converted.data();
    step = 3;
    pitch = static_cast<std::size_t>(image.width) * 3;
  }
  resize(source, {image.height, image.width}, pitch, step, order, target, to, target_pitch);
}

}  // namespace

void make_canvas(const std::vector<ImageView>& images, int shortest_side, int longest_side, Canvas& out, bool cuda,
                 bool on_gpu) {
  if (images.empty()) refuse("there are no pictures; give at least one");
  out.pictures.clear();
  out.originals.clear();
  out.canvas = {};
  out.unsized.clear();
  std::size_t on_device = 0;
  for (const ImageView& image : images) {
    check(image, cuda);
    if (image.memory == Memory::cuda) ++on_device;
    const Size size = network_size(image.height, image.width, shortest_side, longest_side);
    out.originals.push_back({image.height, image.width});
    out.pictures.push_back(size);
    out.canvas = {std::max(out.canvas.height, ceil_to(size.height)), std::max(out.canvas.width, ceil_to(size.width))};
  }
  const Size canvas = out.canvas;
  if (static_cast<std::int64_t>(canvas.width) * canvas.height > kMaxNetworkPixels) {  // that of a tall and a wide strip
    refuse("the resized pictures need a canvas of " + std::to_string(canvas.width) + "x" + std::to_string(canvas.height) +
           " pixels, more than " + std::to_string(kMaxNetworkPixels) +
           " in all; set a longest side (official: 1333), or give pictures of other shapes in another call");
  }
  if (on_device != 0 && on_device != images.size()) {
    refuse("some of the pictures are in GPU memory and some are not; copy those");
  }
  if (on_device != 0 || on_gpu) {
    out.unsized = images;
    out.pixels.clear();
    return;
  }
  const std::size_t pitch = static_cast<std::size_t>(out.canvas.width) * 3;
  const std::size_t bytes = pitch * static_cast<std::size_t>(out.canvas.height);
  out.pixels.assign(bytes * images.size(), 0);
  for (std::size_t i = 0; i < images.size(); ++i) place(images[i], out.pictures[i], &out.pixels[i * bytes], pitch);
}

std::size_t packed_bytes(const ImageView& image) {
  const std::size_t pixels = static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height);
  if (image.format == PixelFormat::nv12) return pixels + pixels / 2;
  return pixels * (image.format == PixelFormat::gray ? 3 : static_cast<std::size_t>(bytes_of(image.format)));
}

ImageView pack(const ImageView& image, std::uint8_t* target, const void* address) {
  const auto width = static_cast<std::size_t>(image.width), height = static_cast<std::size_t>(image.height);
  const auto row = width * static_cast<std::size_t>(bytes_of(image.format));
  const std::size_t pitch = image.pitch ? image.pitch : row;
  const auto* source = static_cast<const std::uint8_t*>(image.data);
  ImageView out;
  out.data = address;
  out.width = image.width;
  out.height = image.height;
  out.format = image.format;
  out.memory = Memory::cuda;
  if (image.format == PixelFormat::gray) {  // which the GPU's resize does not read
    out.format = PixelFormat::bgr;
    for (std::size_t y = 0; y < height; ++y, source += pitch) {
      for (std::size_t x = 0; x < width; ++x, target += 3) std::fill(target, target + 3, source[x]);
    }
    return out;
  }
  const auto copy = [&](const std::uint8_t* plane, std::size_t plane_pitch, std::size_t rows) {
    if (plane_pitch == row) {
      target = std::copy_n(plane, rows * row, target);
      return;
    }
    for (std::size_t y = 0; y < rows; ++y, plane += plane_pitch) target = std::copy_n(plane, row, target);
  };
  copy(source, pitch, height);
  if (image.format == PixelFormat::nv12) {
    const auto* chroma = image.chroma ? static_cast<const std::uint8_t*>(image.chroma) : source + pitch * height;
    copy(chroma, image.chroma_pitch ? image.chroma_pitch : pitch, height / 2);
  }
  return out;  // without gaps, which are the defaults of pitch and chroma
}

}  // namespace glip
