#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "glip/glip.h"
#include "glip/glip.hpp"
#include "guard.hpp"

struct glip_detector {
  glip::Detector detector;
};
struct glip_prompt {
  glip::Prompt prompt;
};
struct glip_detections {
  std::vector<glip::Detection> found;
};

namespace {

thread_local std::string last_error;

glip_status failed(glip_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

/// Run a body; what it throws becomes a status and a message.
template <typename Body>
glip_status run(Body body) noexcept {
  try {
    glip::guarded(body);
    return GLIP_OK;
  } catch (const glip::Error& error) {
    return failed(static_cast<glip_status>(error.kind()), error.what());
  } catch (...) {
    return failed(GLIP_INTERNAL, "an unknown exception was thrown; please report it");
  }
}

void need(const void* pointer, const char* name) {
  if (!pointer) throw glip::Error(glip::ErrorKind::option, std::string(name) + " is a null pointer; pass one that is not");
}

/// A copy of a struct of this or another version: members that the caller does not know are zero.
template <typename T>
T known(const T* given, const char* name) {
  need(given, name);
  T out{};
  std::size_t size = 0;
  std::memcpy(&size, given, sizeof size);
  if (size < sizeof(std::size_t) || size > 4096) {
    throw glip::Error(glip::ErrorKind::option,
                      std::string(name) + " has the size " + std::to_string(size) + "; set its first member with sizeof");
  }
  std::memcpy(static_cast<void*>(&out), given, std::min(size, sizeof out));
  return out;
}

glip::ImageView view_of(const glip_image* image) {
  const glip_image given = known(image, "image");
  glip::ImageView view;
  view.data = given.data;
  view.width = given.width;
  view.height = given.height;
  view.pitch = given.pitch;
  view.format = static_cast<glip::PixelFormat>(given.format);
  view.memory = static_cast<glip::Memory>(given.memory);
  view.chroma = given.chroma;
  view.chroma_pitch = given.chroma_pitch;
  view.stream = given.stream;
  return view;
}

/// Set the pointers of a result to null, before anything can fail.
void clear(glip_detections** detections, std::size_t count) {
  need(detections, "detections");
  std::fill(detections, detections + count, nullptr);
}

/// Hand over what was found: all, or nothing where there is no memory.
void hand_over(std::vector<std::vector<glip::Detection>>&& found, glip_detections** detections) {
  std::vector<std::unique_ptr<glip_detections>> made;
  made.reserve(found.size());
  for (auto& one : found) made.push_back(std::make_unique<glip_detections>(glip_detections{std::move(one)}));
  for (std::size_t i = 0; i < made.size(); ++i) detections[i] = made[i].release();
}

}  // namespace

const char* glip_version(void) { return glip::version(); }
const char* glip_last_error(void) { return last_error.c_str(); }

glip_status glip_open(const char* path, const glip_options* options, glip_detector** detector) {
  return run([&] {
    need(detector, "detector");
    *detector = nullptr;
    need(path, "path");
    glip::Options chosen;
    if (options) {
      const glip_options given = known(options, "options");
      if (given.backend) chosen.backend = given.backend;
      if (given.precision) chosen.precision = given.precision;
      if (given.shortest_side != 0) chosen.shortest_side = given.shortest_side;
      if (given.longest_side != 0) chosen.longest_side = given.longest_side == -1 ? 0 : given.longest_side;
      if (given.cache_dir) chosen.cache_dir = given.cache_dir;
      chosen.threads = given.threads;
      chosen.cache = given.no_cache == 0;
      chosen.verify = given.no_verify == 0;
      if (given.engines) chosen.engines = given.engines;
      chosen.trusted = given.untrusted == 0;
      chosen.plugins = given.no_plugins == 0;
      if (given.resize) chosen.resize = given.resize;
    }
    *detector = new glip_detector{glip::Detector::open(path, chosen)};
  });
}

const char* glip_resize(const glip_detector* detector) {
  const char* out = nullptr;
  run([&] {
    need(detector, "detector");
    out = detector->detector.resize();
  });
  return out;
}

glip_status glip_clone(const glip_detector* detector, glip_detector** twin) {
  return run([&] {
    need(twin, "twin");
    *twin = nullptr;
    need(detector, "detector");
    *twin = new glip_detector{detector->detector.clone()};
  });
}

void glip_close(glip_detector* detector) { delete detector; }

glip_status glip_encode(glip_detector* detector, const char* caption, glip_prompt** prompt) {
  return run([&] {
    need(prompt, "prompt");
    *prompt = nullptr;
    need(detector, "detector");
    need(caption, "caption");
    *prompt = new glip_prompt{detector->detector.encode(std::string(caption))};
  });
}

glip_status glip_encode_names(glip_detector* detector, const char* const* names, size_t count, glip_prompt** prompt) {
  return glip_encode_chunks(detector, names, count, 0, prompt);
}

glip_status glip_encode_chunks(glip_detector* detector, const char* const* names, size_t count, size_t classes_per_prompt,
                               glip_prompt** prompt) {
  return run([&] {
    need(prompt, "prompt");
    *prompt = nullptr;
    need(detector, "detector");
    need(names, "names");
    std::vector<std::string> all;
    for (size_t i = 0; i < count; ++i) {
      need(names[i], "a name");
      all.emplace_back(names[i]);
    }
    *prompt = new glip_prompt{detector->detector.encode(all, classes_per_prompt)};
  });
}

glip_status glip_encode_spans(glip_detector* detector, const char* caption, const size_t* starts, const size_t* ends,
                              size_t count, glip_prompt** prompt) {
  return run([&] {
    need(prompt, "prompt");
    *prompt = nullptr;
    need(detector, "detector");
    need(caption, "caption");
    need(starts, "starts");
    need(ends, "ends");
    std::vector<glip::Phrase> phrases;
    for (size_t i = 0; i < count; ++i) phrases.push_back({{{starts[i], ends[i]}}, ""});
    *prompt = new glip_prompt{detector->detector.encode(std::string(caption), phrases)};
  });
}

glip_status glip_encode_phrases(glip_detector* detector, const char* caption, const glip_phrase* const* phrases, size_t count,
                                glip_prompt** prompt) {
  return run([&] {
    need(prompt, "prompt");
    *prompt = nullptr;
    need(detector, "detector");
    need(caption, "caption");
    if (count > 0) need(phrases, "phrases");
    std::vector<glip::Phrase> all;
    for (size_t i = 0; i < count; ++i) {
      const glip_phrase given = known(phrases[i], "a phrase");
      if (given.count > 0) need(given.starts, "starts"), need(given.ends, "ends");
      glip::Phrase phrase;
      for (size_t piece = 0; piece < given.count; ++piece) phrase.spans.emplace_back(given.starts[piece], given.ends[piece]);
      if (given.label) phrase.label = given.label;
      all.push_back(std::move(phrase));
    }
    *prompt = new glip_prompt{detector->detector.encode(std::string(caption), all)};
  });
}

size_t glip_prompt_classes(const glip_prompt* prompt) { return prompt ? prompt->prompt.phrases().size() : 0; }

size_t glip_prompt_chunks(const glip_prompt* prompt) { return prompt ? prompt->prompt.chunks() : 0; }

const char* glip_prompt_phrase(const glip_prompt* prompt, size_t index) {
  return index < glip_prompt_classes(prompt) ? prompt->prompt.phrases()[index].c_str() : nullptr;
}

void glip_prompt_free(glip_prompt* prompt) { delete prompt; }

glip_status glip_detect(glip_detector* detector, const glip_image* image, const glip_prompt* prompt, float threshold,
                        glip_detections** detections) {
  return run([&] {
    need(detections, "detections");
    *detections = nullptr;
    need(detector, "detector");
    need(prompt, "prompt");
    *detections = new glip_detections{detector->detector.detect(view_of(image), prompt->prompt, threshold)};
  });
}

glip_status glip_detect_batch(glip_detector* detector, const glip_image* const* images, size_t count, const glip_prompt* prompt,
                              float threshold, glip_detections** detections) {
  return run([&] {
    clear(detections, count);
    need(detector, "detector");
    need(prompt, "prompt");
    if (count > 0) need(images, "images");
    std::vector<glip::ImageView> views;
    for (size_t i = 0; i < count; ++i) views.push_back(view_of(images[i]));
    hand_over(detector->detector.detect(views, prompt->prompt, threshold), detections);
  });
}

glip_status glip_detect_prompts(glip_detector* detector, const glip_image* image, const glip_prompt* const* prompts,
                                size_t count, float threshold, glip_detections** detections) {
  return run([&] {
    clear(detections, count);
    need(detector, "detector");
    if (count > 0) need(prompts, "prompts");
    std::vector<glip::Prompt> all;
    for (size_t i = 0; i < count; ++i) {
      need(prompts[i], "a prompt");
      all.push_back(prompts[i]->prompt);
    }
    hand_over(detector->detector.detect_prompts(view_of(image), all, threshold), detections);
  });
}

size_t glip_detections_count(const glip_detections* detections) { return detections ? detections->found.size() : 0; }

glip_status glip_detections_get(const glip_detections* detections, size_t index, glip_detection* detection) {
  return run([&] {
    need(detections, "detections");
    need(detection, "detection");
    if (index >= detections->found.size()) {
      throw glip::Error(glip::ErrorKind::option, "detection " + std::to_string(index) + " does not exist; there are " +
                                                     std::to_string(detections->found.size()));
    }
    const glip::Detection& one = detections->found[index];
    *detection = {one.x1, one.y1, one.x2, one.y2, one.score, one.label, one.phrase.c_str()};
  });
}

void glip_detections_free(glip_detections* detections) { delete detections; }
