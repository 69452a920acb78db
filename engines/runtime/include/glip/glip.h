/* Open-vocabulary detection with exported GLIP bundles: the C interface, which other languages can bind.
 *
 * Every function that can fail returns GLIP_OK or another glip_status; glip_last_error() then has one line that says why, for
 * the calling thread. A struct that goes in begins with its own size, so that later versions can add members: set it with
 * sizeof, or with an initializer below. A null pointer where none is allowed gives GLIP_OPTION. */
#ifndef GLIP_GLIP_H
#define GLIP_GLIP_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define GLIP_C_API
#else
#define GLIP_C_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum glip_status {
  GLIP_OK = 0,
  GLIP_OPTION = 1,
  GLIP_PROMPT = 2,
  GLIP_FRAME = 3,
  GLIP_BUNDLE = 4,
  GLIP_BACKEND = 5,
  GLIP_MISSING = 6,
  GLIP_CLOSED = 7,
  GLIP_INTERNAL = 8
} glip_status;

typedef enum glip_format { GLIP_BGR = 0, GLIP_RGB = 1, GLIP_BGRA = 2, GLIP_RGBA = 3, GLIP_GRAY = 4, GLIP_NV12 = 5 } glip_format;

typedef struct glip_detector glip_detector;
typedef struct glip_prompt glip_prompt;
typedef struct glip_detections glip_detections;

/* What is 0 or null takes the value of glip::Options in glip.hpp, but for longest_side, where 0 takes 1333 and -1 is no
 * limit. */
typedef struct glip_options {
  size_t size;
  const char* backend;
  const char* precision;
  int32_t shortest_side;
  int32_t longest_side;
  int32_t threads;
  int32_t no_cache;
  int32_t no_verify;
  const char* cache_dir;
  const char* engines;
  int32_t untrusted;
  int32_t no_plugins;
  const char* resize;
} glip_options;
#define GLIP_OPTIONS_INIT \
  { sizeof(glip_options), NULL, NULL, 0, 0, 0, 0, 0, NULL, NULL, 0, 0, NULL }

/* See glip::ImageView in glip.hpp. memory: 0 host, 1 CUDA. */
typedef struct glip_image {
  size_t size;
  const void* data;
  int32_t width;
  int32_t height;
  size_t pitch;
  int32_t format;
  int32_t memory;
  const void* chroma;
  size_t chroma_pitch;
  void* stream;
} glip_image;
#define GLIP_IMAGE_INIT \
  { sizeof(glip_image), NULL, 0, 0, 0, GLIP_BGR, 0, NULL, 0, NULL }

/* A phrase of a caption: its count pieces, piece i from character (code point) starts[i] to ends[i], which is exclusive. label
 * may be null for the words of the pieces. */
typedef struct glip_phrase {
  size_t size;
  const size_t* starts;
  const size_t* ends;
  size_t count;
  const char* label;
} glip_phrase;
#define GLIP_PHRASE_INIT \
  { sizeof(glip_phrase), NULL, NULL, 0, NULL }

/* The phrase belongs to the detections it came from. */
typedef struct glip_detection {
  float x1, y1, x2, y2;
  float score;
  int32_t label;
  const char* phrase;
} glip_detection;

GLIP_C_API const char* glip_version(void);

/* The last error of the calling thread; empty if there was none. */
GLIP_C_API const char* glip_last_error(void);

/* options may be null. */
GLIP_C_API glip_status glip_open(const char* path, const glip_options* options, glip_detector** detector);
/* How pictures of the host are resized: "exact" or "gpu"; null if detector is. */
GLIP_C_API const char* glip_resize(const glip_detector* detector);
GLIP_C_API glip_status glip_clone(const glip_detector* detector, glip_detector** twin);
/* No other call may be using the detector. Clones, prompts and detections go on. */
GLIP_C_API void glip_close(glip_detector* detector);

GLIP_C_API glip_status glip_encode(glip_detector* detector, const char* caption, glip_prompt** prompt);
/* A list may have any length: one that does not fit into a prompt is divided into chunks. */
GLIP_C_API glip_status glip_encode_names(glip_detector* detector, const char* const* names, size_t count, glip_prompt** prompt);
/* The same with so many names in each chunk, or fewer where they do not fit; 0 fills prompts. */
GLIP_C_API glip_status glip_encode_chunks(glip_detector* detector, const char* const* names, size_t count,
                                          size_t classes_per_prompt, glip_prompt** prompt);
/* Phrase i of a caption is its characters (code points) from starts[i] to ends[i], which is exclusive. */
GLIP_C_API glip_status glip_encode_spans(glip_detector* detector, const char* caption, const size_t* starts, const size_t* ends,
                                         size_t count, glip_prompt** prompt);
/* A caption with phrases in several pieces, or with labels of their own. */
GLIP_C_API glip_status glip_encode_phrases(glip_detector* detector, const char* caption, const glip_phrase* const* phrases,
                                           size_t count, glip_prompt** prompt);
GLIP_C_API size_t glip_prompt_classes(const glip_prompt* prompt);
/* How many runs of the head it takes: 1, or more for a long list of names. */
GLIP_C_API size_t glip_prompt_chunks(const glip_prompt* prompt);
/* Null if there is no such class. */
GLIP_C_API const char* glip_prompt_phrase(const glip_prompt* prompt, size_t index);
GLIP_C_API void glip_prompt_free(glip_prompt* prompt);

GLIP_C_API glip_status glip_detect(glip_detector* detector, const glip_image* image, const glip_prompt* prompt, float threshold,
                                   glip_detections** detections);
/* Several pictures at once, on a canvas as large as the largest needs. detections has room for count pointers, one for each
 * picture; on an error all are null. */
GLIP_C_API glip_status glip_detect_batch(glip_detector* detector, const glip_image* const* images, size_t count,
                                         const glip_prompt* prompt, float threshold, glip_detections** detections);
/* Several prompts in one picture, for which the backbone runs once. detections has room for count pointers, one for each
 * prompt; on an error all are null. */
GLIP_C_API glip_status glip_detect_prompts(glip_detector* detector, const glip_image* image, const glip_prompt* const* prompts,
                                           size_t count, float threshold, glip_detections** detections);
GLIP_C_API size_t glip_detections_count(const glip_detections* detections);
GLIP_C_API glip_status glip_detections_get(const glip_detections* detections, size_t index, glip_detection* detection);
GLIP_C_API void glip_detections_free(glip_detections* detections);

#ifdef __cplusplus
}
#endif

#endif
