// Pictures resized as GLIP was trained, and placed on the network's canvas; the arithmetic of glip_deploy/frames.
#pragma once

#include <cstdint>
#include <vector>

#include "glip/glip.hpp"

namespace glip {

struct Size {
  int height = 0, width = 0;
};

/// (height, width) to which the official code resizes a picture.
Size network_size(int height, int width, int shortest_side, int longest_side);

/// Pictures on zero-padded BGR canvases of one size, as large as the largest picture needs, each top left in its own.
struct Canvas {
  std::vector<std::uint8_t> pixels;  ///< (pictures, canvas.height, canvas.width, 3)
  Size canvas;
  std::vector<Size> pictures;      ///< of each resized picture, without padding
  std::vector<Size> originals;     ///< of each picture as it was given
  std::vector<ImageView> unsized;  ///< pictures that the backend resizes, all in CUDA memory or none; then there are no pixels
};

/// Throws Error(frame) for an illegal picture, or where there is none. `out` is written again, its memory is kept. `cuda` says
/// whether pictures may be in CUDA memory: then all are, or none. Those are left to the backend, and with `on_gpu` those of the
/// host too.
void make_canvas(const std::vector<ImageView>& images, int shortest_side, int longest_side, Canvas& out, bool cuda = false,
                 bool on_gpu = false);

/// Bytes of a picture without gaps, as the GPU's resize takes it: gray in three channels, NV12 with the color plane behind the
/// brightness.
std::size_t packed_bytes(const ImageView& image);
/// Copy a checked picture of the host into so many bytes; returns the picture that they are at `address` of the GPU, once they
/// are copied there.
ImageView pack(const ImageView& image, std::uint8_t* target, const void* address);

/// Pillow's antialiased bilinear filter on uint8, bit for bit. `source` has `step` bytes a pixel, of which the three at
/// `order` are taken; `target` has three bytes a pixel and rows of `target_pitch` bytes.
void resize(const std::uint8_t* source, Size from, std::size_t pitch, int step, const int (&order)[3], std::uint8_t* target,
            Size to, std::size_t target_pitch);

}  // namespace glip
