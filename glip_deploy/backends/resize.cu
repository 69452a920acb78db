// A frame in GPU memory to its place on the network's canvas: resized, in BGR, zero around it.
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

// One thread a pixel of the canvas. `in` has `channels` bytes a pixel (3, or 4 with one that is passed over) and rows
// `in_stride` bytes apart; `red` is the place of red, 0 or 2. The canvas has three bytes a pixel and no gaps.
extern "C" __global__ void glip_resize(const unsigned char* in, long long in_stride, int in_height, int in_width,
                                       int channels, int red, unsigned char* out, int canvas_height, int canvas_width,
                                       int height, int width) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= canvas_width || y >= canvas_height) return;
  unsigned char* pixel = out + 3 * (static_cast<long long>(y) * canvas_width + x);
  float sum[3] = {0.0f, 0.0f, 0.0f};
  if (x < width && y < height) {
    const GlipWindow rows = glip_window(y, in_height, static_cast<float>(in_height) / static_cast<float>(height));
    const GlipWindow columns = glip_window(x, in_width, static_cast<float>(in_width) / static_cast<float>(width));
    float total = 0.0f;
    for (int row = rows.first; row < rows.last; ++row) {
      const float vertical = glip_weight(rows, row);
      const unsigned char* from = in + row * in_stride;
      for (int column = columns.first; column < columns.last; ++column) {
        const float weight = vertical * glip_weight(columns, column);
        const unsigned char* value = from + static_cast<long long>(column) * channels;
        total += weight;
        sum[0] += weight * static_cast<float>(value[0]);
        sum[1] += weight * static_cast<float>(value[1]);
        sum[2] += weight * static_cast<float>(value[2]);
      }
    }
    for (float& channel : sum) channel = channel / total + 0.5f;
  }
  pixel[0] = static_cast<unsigned char>(sum[2 - red]);  // blue
  pixel[1] = static_cast<unsigned char>(sum[1]);
  pixel[2] = static_cast<unsigned char>(sum[red]);
}
