// What the simulated TensorRT, and the tests, ask of the simulated CUDA.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <functional>

/// Do something now, or record it while the stream is captured.
CUresult simulated_enqueue(const char* name, void* stream, const std::function<bool()>& work);
/// Whether memory was allocated on the device.
bool simulated_is_device(const void* address, std::size_t bytes);

extern "C" {
using simulated_resize = void (*)(const std::uint8_t* source, long long pitch, int height, int width, int channels, int red,
                                  const std::uint8_t* chroma, long long chroma_pitch, std::uint8_t* canvas, int canvas_height,
                                  int canvas_width, int to_height, int to_width);
/// What was done since the last call, one word or phrase a line.
const char* simulated_log();
/// How many things are there: device, pinned, streams, graphs, executables, modules, primary, current; or violations.
int simulated_live(const char* what);
/// Make a function fail, once, after so many calls.
void simulated_fail(const char* function, int after, int error);
void simulated_driver(int version);
void simulated_launcher(simulated_resize function);
}
