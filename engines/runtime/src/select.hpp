// From the candidates of the image branch to detections: NMS, thresholds, pixels of the picture.
#pragma once

#include <string>
#include <vector>

#include "frames.hpp"
#include "glip/glip.hpp"

namespace glip {

/// What the image branch gives for one picture: slots, before NMS. A slot with score 0 is empty.
struct Candidates {
  std::vector<float> boxes;  ///< (slots, 4), x1 y1 x2 y2 in pixels of the resized picture
  std::vector<float> scores;
  std::vector<std::int64_t> labels;
};

/// The rule of glip_deploy/results: within a class, a box goes when its IoU with a better one is strictly above `iou`;
/// equal scores are visited in the order given; what ties with the last one kept is kept too.
std::vector<Detection> select(const Candidates& found, const std::vector<float>& thresholds,
                              const std::vector<std::string>& phrases, Size picture, Size original, double iou,
                              std::size_t max_detections);

}  // namespace glip
