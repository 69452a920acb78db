/* glip_detect_image_c BUNDLE PROMPT WIDTH HEIGHT FILE [SHORTEST_SIDE]: detect in WIDTH x HEIGHT raw BGR
 * pixels, a box a line. */

#include <stdio.h>
#include <stdlib.h>

#include "glip/glip.h"

static int failed(const char* what) {
  fprintf(stderr, "glip_detect_image_c: error: %s: %s\n", what, glip_last_error());
  return 1;
}

int main(int count, char** arguments) {
  glip_detector* detector = NULL;
  glip_prompt* prompt = NULL;
  glip_detections* found = NULL;
  glip_image image = GLIP_IMAGE_INIT;
  glip_options options = GLIP_OPTIONS_INIT;
  void* pixels = NULL;
  size_t size, i;
  FILE* file;
  int status = 0;

  if (count != 6 && count != 7) {
    fprintf(stderr, "usage: glip_detect_image_c BUNDLE PROMPT WIDTH HEIGHT FILE [SHORTEST_SIDE]\n");
    return 2;
  }
  image.width = atoi(arguments[3]);
  image.height = atoi(arguments[4]);
  if (image.width < 1 || image.height < 1 || image.width > 30000 || image.height > 30000) {
    fprintf(stderr, "glip_detect_image_c: error: width and height are from 1 to 30000 pixels\n");
    return 2;
  }
  size = (size_t)image.width * (size_t)image.height * 3;
  pixels = malloc(size);
  file = fopen(arguments[5], "rb");
  if (!pixels || !file || fread(pixels, 1, size, file) != size) {
    fprintf(stderr, "glip_detect_image_c: error: %s does not hold %lu bytes\n", arguments[5], (unsigned long)size);
    status = 1;
  }
  if (file) fclose(file);
  image.data = pixels;
  if (count == 7) options.shortest_side = atoi(arguments[6]);
  if (!status && glip_open(arguments[1], &options, &detector)) status = failed("open");
  if (!status && glip_encode(detector, arguments[2], &prompt)) status = failed("encode");
  if (!status && glip_detect(detector, &image, prompt, 0.5f, &found)) status = failed("detect");
  for (i = 0; !status && i < glip_detections_count(found); ++i) {
    glip_detection one;
    if (glip_detections_get(found, i, &one)) {
      status = failed("get");
    } else {
      printf("%.9g %s %.9g %.9g %.9g %.9g\n", one.score, one.phrase, one.x1, one.y1, one.x2, one.y2);
    }
  }
  glip_detections_free(found);
  glip_prompt_free(prompt);
  glip_close(detector);
  free(pixels);
  return status;
}
