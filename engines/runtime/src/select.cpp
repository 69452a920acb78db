#include "select.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace glip {
namespace {

// All in float32 and in the order of the official devIoU, so that results lie on the same side of the threshold.
float area_of(const float* box) { return std::max(box[2] - box[0] + 1.0f, 0.0f) * std::max(box[3] - box[1] + 1.0f, 0.0f); }

bool overlaps(const float* a, const float* b, float limit) {
  const float width = std::min(a[2], b[2]) - std::max(a[0], b[0]) + 1.0f;
  const float height = std::min(a[3], b[3]) - std::max(a[1], b[1]) + 1.0f;
  const float shared = std::max(width, 0.0f) * std::max(height, 0.0f);
  return shared / (area_of(a) + area_of(b) - shared) > limit;  // 0 / 0 is above no threshold
}

}  // namespace

std::vector<Detection> select(const Candidates& found, const std::vector<float>& thresholds,
                              const std::vector<std::string>& phrases, Size picture, Size original, double iou,
                              std::size_t max_detections) {
  if (found.boxes.size() != 4 * found.scores.size() || found.labels.size() != found.scores.size()) {
    throw Error(ErrorKind::backend, "the image branch gave " + std::to_string(found.boxes.size()) + " sides of boxes, " +
                                        std::to_string(found.scores.size()) + " scores and " +
                                        std::to_string(found.labels.size()) + " labels; export the bundle again");
  }
  const float lowest = std::max(*std::min_element(thresholds.begin(), thresholds.end()), 0.0f);
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < found.scores.size(); ++i) {
    if (!(found.scores[i] > lowest)) continue;
    bool sane = found.labels[i] >= 0 && static_cast<std::size_t>(found.labels[i]) < phrases.size();
    for (std::size_t side = 0; side < 4; ++side) sane = sane && std::isfinite(found.boxes[4 * i + side]);
    if (!sane || !std::isfinite(found.scores[i])) {
      throw Error(ErrorKind::backend,
                  "the image branch gave candidates that cannot be right (a box that is not finite,"
                  " or an unknown class); try another precision, or export the bundle again");
    }
    order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return found.scores[a] > found.scores[b]; });

  std::vector<std::vector<std::size_t>> kept_by_class(phrases.size());
  std::vector<std::size_t> kept;
  const float limit = static_cast<float>(iou);
  for (const std::size_t candidate : order) {
    if (kept.size() >= max_detections && found.scores[candidate] < found.scores[kept[max_detections - 1]]) break;
    auto& rivals = kept_by_class[static_cast<std::size_t>(found.labels[candidate])];
    const float* box = &found.boxes[4 * candidate];
    const bool hidden =
        std::any_of(rivals.begin(), rivals.end(), [&](std::size_t i) { return overlaps(&found.boxes[4 * i], box, limit); });
    if (hidden) continue;
    rivals.push_back(candidate);
    kept.push_back(candidate);
  }

  const float across = static_cast<float>(static_cast<double>(original.width) / picture.width);
  const float down = static_cast<float>(static_cast<double>(original.height) / picture.height);
  std::vector<Detection> out;
  for (const std::size_t i : kept) {
    const auto label = static_cast<std::size_t>(found.labels[i]);
    if (!(found.scores[i] > thresholds[label])) continue;
    const float* box = &found.boxes[4 * i];
    out.push_back({box[0] * across, box[1] * down, box[2] * across, box[3] * down, found.scores[i], static_cast<int>(label),
                   phrases[label]});
  }
  return out;
}

}  // namespace glip
