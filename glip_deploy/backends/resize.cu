// A frame in GPU memory to its place on the network's canvas: resized, in BGR, zero around it.
//
// NV12, what video decoders write, is brought to BGR first, with OpenCV's integers (`glip_deploy/frames/nv12.py`).
//
// The arithmetic is Pillow's antialiased bilinear: a triangle filter as wide as the shrinking factor, its weights
// normalized over the pixels that exist. Pillow goes along rows, then along columns, and rounds to 8 bits each time with
// integer weights; here both directions are one sum in fp32, which agrees with it to one gray level.
//
// Compiled at run time by NVRTC; it includes nothing.

// Where along one axis an output pixel looks: pixels first..last-1 around center, with weights 1 - |distance| / support.
struct GlipWindow {
  float center, inverse_support;
  int first, last;
};

__device__ inline GlipWindow glip_window(int out, int in_size, float scale) {
  const float support = scale > 1.0f ? scale : 1.0f;
  GlipWindow window;
  window.center = (static_cast<float>(out) + 0.5f) * scale;
  window.inverse_support = 1.0f / support;
  const int first = static_cast<int>(window.center - support + 0.5f);
  const int last = static_cast<int>(window.center + support + 0.5f);
  window.first = first < 0 ? 0 : first;
  window.last = last > in_size ? in_size : last;
  return window;
}

__device__ inline float glip_weight(const GlipWindow& window, int pixel) {
  const float distance = (static_cast<float>(pixel) - window.center + 0.5f) * window.inverse_support;
  const float weight = 1.0f - (distance < 0.0f ? -distance : distance);
  return weight > 0.0f ? weight : 0.0f;
}

// Three bytes a pixel, or four of which the last is passed over; rows `stride` bytes apart.
struct GlipPacked {
  const unsigned char* data;
  long long stride;
  int channels, red;

  __device__ void at(int row, int column, float* bgr) const {
    const unsigned char* value = data + row * stride + static_cast<long long>(column) * channels;
    bgr[0] = static_cast<float>(value[2 - red]);
    bgr[1] = static_cast<float>(value[1]);
    bgr[2] = static_cast<float>(value[red]);
  }
};

// A plane of brightness, and one of half its height with U and V of two by two pixels side by side.
struct GlipNv12 {
  const unsigned char* luma;
  long long luma_stride;
  const unsigned char* chroma;
  long long chroma_stride;

  __device__ static float clipped(int value) {
    value >>= 20;
    return static_cast<float>(value < 0 ? 0 : value > 255 ? 255 : value);
  }

  __device__ void at(int row, int column, float* bgr) const {
    const int above = luma[row * luma_stride + column] - 16;
    const unsigned char* pair = chroma + row / 2 * chroma_stride + column / 2 * 2;
    const int light = (above < 0 ? 0 : above) * 1220542 + (1 << 19);
    const int u = pair[0] - 128, v = pair[1] - 128;
    bgr[0] = clipped(light + 2116026 * u);
    bgr[1] = clipped(light - 409993 * u - 852492 * v);
    bgr[2] = clipped(light + 1673527 * v);
  }
};

// One thread a pixel of the canvas, which has three bytes a pixel and no gaps.
template <class Frame>
__device__ inline void glip_draw(const Frame& frame, int in_height, int in_width, unsigned char* out, int canvas_height,
                                 int canvas_width, int height, int width) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= canvas_width || y >= canvas_height) return;
  float sum[3] = {0.0f, 0.0f, 0.0f};
  if (x < width && y < height) {
    const GlipWindow rows = glip_window(y, in_height, static_cast<float>(in_height) / static_cast<float>(height));
    const GlipWindow columns = glip_window(x, in_width, static_cast<float>(in_width) / static_cast<float>(width));
    float total = 0.0f;
    for (int row = rows.first; row < rows.last; ++row) {
      const float vertical = glip_weight(rows, row);
      for (int column = columns.first; column < columns.last; ++column) {
        const float weight = vertical * glip_weight(columns, column);
        float bgr[3];
        frame.at(row, column, bgr);
        total += weight;
        for (int channel = 0; channel < 3; ++channel) sum[channel] += weight * bgr[channel];
      }
    }
    for (float& channel : sum) channel = channel / total + 0.5f;
  }
  unsigned char* pixel = out + 3 * (static_cast<long long>(y) * canvas_width + x);
  for (int channel = 0; channel < 3; ++channel) pixel[channel] = static_cast<unsigned char>(sum[channel]);
}

// `in` has `channels` bytes a pixel (3, or 4 with one that is passed over) and rows `in_stride` bytes apart; `red` is
// the place of red, 0 or 2.
extern "C" __global__ void glip_resize(const unsigned char* in, long long in_stride, int in_height, int in_width,
                                       int channels, int red, unsigned char* out, int canvas_height, int canvas_width,
                                       int height, int width) {
  const GlipPacked frame{in, in_stride, channels, red};
  glip_draw(frame, in_height, in_width, out, canvas_height, canvas_width, height, width);
}

extern "C" __global__ void glip_resize_nv12(const unsigned char* luma, long long luma_stride,
                                            const unsigned char* chroma, long long chroma_stride, int in_height,
                                            int in_width, unsigned char* out, int canvas_height, int canvas_width,
                                            int height, int width) {
  const GlipNv12 frame{luma, luma_stride, chroma, chroma_stride};
  glip_draw(frame, in_height, in_width, out, canvas_height, canvas_width, height, width);
}
